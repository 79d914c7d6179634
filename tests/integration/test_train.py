"""train.py as a person starts it: on two real ranks, on real images."""

import json
import re

import pytest
import torch

from benchmarks.tables import read_scalars
from tests import jobs
from tests.integration.conftest import KILLED, SMALL, SPARSE
from tests.long import long

pytestmark = pytest.mark.integration
after_the_undisturbed = pytest.mark.xdist_group("undisturbed")


def test_a_run_leaves_its_figures_and_can_be_scored(runs):
    words = {"configs": SPARSE, "train__num_epochs": 2}
    output = runs.succeed("--suffix", ".try", launcher="horovodrun", **words)
    assert "configs.train.num_epochs = 2" in output
    assert "taken without worker_state_dict" not in output  # a person's mistake, not ours
    folder, result = runs.folder(), runs.result()
    assert folder.name == "digits.resnet20+dgc.wm5+dgc.fp16.try"

    assert (result["epochs"], result["steps"], result["world_size"]) == (2, 16, 2)
    assert result["num_parameters"] == 269_434
    assert result["dense_bytes_per_step"] == 4 * 269_434
    assert 0 < result["payload_bytes_per_step"] < result["dense_bytes_per_step"] / 4
    seconds = dict(result["seconds_per_step"])
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total)
    assert min(value for phase, value in seconds.items() if phase != "other") > 0
    assert result["state_bytes"]["velocity"] == 4 * 269_434
    assert 0 < result["state_bytes"]["residual"] < 4 * 269_434
    assert result["state_bytes"]["optimizer"] == 0
    assert result["peak_memory_bytes"] > 10 * 2**20
    assert json.loads((folder / "config.json").read_text()) == result["config"]
    assert result["config"]["configs.dgc.value_dtype"] == "float16"

    events = read_scalars(folder)
    assert [x for x, _ in events["acc/test_top1"]] == [512, 1024]  # x axis: examples
    assert len(events["loss/train"]) == 16
    for tag in ("lr", "comm/density_asked", "comm/density_got", "comm/payload_bytes",
                "comm/sparse_bytes", "comm/hidden_share", "time/select_seconds",
                "time/merge_seconds", "time/step_seconds", "acc/test_top5"):  # fmt: skip
        assert events[tag], tag
    asked = [value for _, value in events["comm/density_asked"]]
    assert asked[0] == pytest.approx(0.1)
    assert asked[-1] == pytest.approx(0.01)
    check_that_a_checkpoint_loads_with_weights_only(folder / "checkpoints")

    scored = runs.succeed("--suffix", ".try", "--evaluate", **words)
    top1 = float(re.search(r"acc/test_top1: ([\d.]+)", scored)[1])
    assert top1 == pytest.approx(result["metrics"]["acc/test_top1"]["best"], abs=1e-3)


def check_that_a_checkpoint_loads_with_weights_only(folder):
    parts = list(folder.glob("*.pt"))
    assert len(parts) == 6  # two steps, a shared part and two ranks' parts each
    for part in parts:
        assert torch.load(part, weights_only=True)
    shared = torch.load(max(folder.glob("*.shared.pt")), weights_only=True)
    assert shared["config"]["configs.train.num_epochs"] == 2
    assert not list(folder.glob("*.tmp"))


@pytest.mark.long
def test_all_launchers_end_with_the_same_parameters(runs):
    """Each run compares its ranks after every epoch; here the runs are compared."""
    hashes = set()
    for number, launcher in enumerate(jobs.LAUNCHERS):
        runs.succeed(configs=SPARSE, launcher=launcher, runs=f"runs{number}")
        hashes.add(runs.result(f"runs{number}")["parameter_hash"])
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        long(["--configs.train.num_epoch", "3"], "did you mean 'num_epochs'?"),
        long(["--configs.train.optimizer.lr=-1"], "Invalid learning rate"),
        long(["--configs.model.num_clases", "10"], "num_clases"),
        long(["--devices", "gpu"], "torch sees no GPU"),
        (["--evaluate"], "Train first"),
    ],
)  # fmt: skip
def test_mistakes_end_the_job_with_a_message(runs, words, complaint):
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert complaint in runs.fail(*words, configs=SPARSE)


def test_a_missing_data_folder_is_named_with_the_remedy(runs, tmp_path):
    configs = ["--configs", "configs/imagenet/resnet50.py", "--configs.dataset.root", str(tmp_path)]
    output = runs.fail(configs=configs)
    assert f"there is no folder {tmp_path}/train" in output
    assert "--configs.dataset.root" in output
    assert "Traceback" not in output


@after_the_undisturbed
def test_going_on_with_other_settings_is_refused(finished):
    output = finished.fail(train__optimizer__lr=0.07, **KILLED)
    assert "configs.train.optimizer.lr: 0.05 against 0.07" in output
    assert "--suffix" in output


@after_the_undisturbed
def test_a_complete_run_says_so_and_keeps_its_result(finished):
    before = finished.result()
    (finished.folder() / "result.json").unlink()  # as if it had been killed just before writing it
    assert "this run is complete" in finished.succeed(**KILLED)
    after = finished.result()
    for key in ("parameter_hash", "metrics", "seconds_per_step", "payload_bytes_per_step"):
        assert after[key] == before[key]
    # The checkpoint knows the peak up to itself; a process that trains nothing is far below it.
    assert after["peak_memory_bytes"] > 0.95 * before["peak_memory_bytes"]


@pytest.mark.long
def test_a_complete_run_leaves_its_result_alone(finished):
    before = (finished.folder() / "result.json").read_bytes()
    assert "this run is complete" in finished.succeed(configs=SMALL, **KILLED)
    assert (finished.folder() / "result.json").read_bytes() == before
