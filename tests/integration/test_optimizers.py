"""Files of configs/optim in real runs: with a sparse exchange, killed and taken up again."""

import pytest

from benchmarks.tables import read_scalars
from tests.integration.conftest import DIGITS, SHORT, SMALL, SPARSE

pytestmark = pytest.mark.integration
SETTINGS = {name.replace(".", "__"): value for name, value in SHORT.items()} | {
    "checkpoint__every_steps": 2,
    "train__num_epochs": 3,
}


def test_a_killed_run_with_all_the_machinery_resumes_to_the_same_bits(runs):
    """Residuals of one byte, SM3 with its rate by steps and its average, 16 bits with a loss scale,
    accumulation and clipping."""
    configs = [*SMALL, "configs/optim/sm3.py", "configs/optim/warmup_cooldown.py",
               "configs/dgc/residual_8bit.py"]  # fmt: skip
    settings = SETTINGS | {
        "train__num_epochs": 4,
        "train__precision": "float16",
        "train__batch_size_per_rank": 16,
        "train__micro_batches_per_step": 2,
        "dgc__clip_norm": 1.0,
    }
    del settings["train__lr_warmup_epochs"]
    one = runs.straight_and_killed(configs=configs, **settings)
    assert one["steps"] == 32
    assert one["config"]["configs.dgc.residual_dtype"] == "int8"
    assert one["metrics"]["loss/train"]["last"] < 2.25  # guessing: 2.3
    assert one["state_bytes"]["residual"] < 1.1 * one["num_parameters"]
    assert 0 < one["state_bytes"]["optimizer"] < 1.1 * one["state_bytes"]["parameters"]
    assert one["state_bytes"]["averaged"] == one["state_bytes"]["parameters"]
    rates = [value for _, value in read_scalars(runs.folder("straight"))["lr"]]
    assert rates[-1] < max(rates)  # it falls over the last tenth, by step


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [["sm3", "warmup_cooldown"], ["sketch_adam"]],
    ids=["SM3, its rate and its averaging", "both of Adam's moments in sketches"],
)
def test_a_killed_run_with_small_state_resumes_to_the_same_bits(runs, names):
    configs = [*SPARSE, *(f"configs/optim/{name}.py" for name in names)]
    settings = dict(SETTINGS)
    if "warmup_cooldown" in names:
        del settings["train__lr_warmup_epochs"]
    one = runs.straight_and_killed(configs=configs, **settings)
    assert one["metrics"]["loss/train"]["last"] < 2.25  # guessing: 2.3
    assert 0 < one["state_bytes"]["optimizer"] < 1.1 * one["state_bytes"]["parameters"]
    averaged = one["state_bytes"]["parameters"] if "warmup_cooldown" in names else 0
    assert one["state_bytes"]["averaged"] == averaged


def test_the_recommended_method_learns_on_two_bytes_a_parameter(runs):
    """The run compares its replicas after each epoch."""
    configs = [*DIGITS, "configs/optim/parsimony.py"]
    settings = {"train__num_epochs": 3, "train__lr_warmup_epochs": 1}
    runs.succeed(configs=configs, launcher="horovodrun", **settings)
    result = runs.result()
    kinds = dict(result["state_bytes"])
    assert kinds["residual"] < 2 * result["num_parameters"]
    kept = sum(kinds[kind] for kind in ("velocity", "residual", "statistics", "optimizer"))
    assert kept / result["num_parameters"] < 2.6  # biases and small tensors keep 4 bytes
    assert kinds["gradients"] == 0
    assert result["metrics"]["acc/test_top1"]["last"] > 85
    assert result["skipped_steps"] == 0
    assert result["dense_bytes_per_step"] > 80 * result["payload_bytes_per_step"]


@pytest.mark.long
def test_a_killed_run_in_float16_with_residuals_of_one_byte_resumes_to_the_same_bits(runs):
    small = ["tests/integration/perceptron.py", "configs/optim/parsimony.py"]
    configs = [*DIGITS, *small, "configs/dgc/residual_8bit.py"]
    settings = SETTINGS | {
        "train__num_epochs": 12,  # steps are quick, and it is to be killed before the last
        "train__precision": "float16",
        "data__samples_per_epoch": 512,
    }
    one = runs.straight_and_killed(configs=configs, **settings)
    assert one["config"]["configs.dgc.residual_dtype"] == "int8"
    assert one["metrics"]["loss/train"]["last"] < 1
    assert one["state_bytes"]["residual"] < 1.1 * one["num_parameters"]
