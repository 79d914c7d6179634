"""train.py as a person starts it: on two real ranks, on real images."""

import json
import re

import pytest
import torch

from benchmarks.tables import read_scalars
from tests import jobs
from tests.integration.conftest import DIGITS, SPARSE

pytestmark = pytest.mark.integration


def test_a_run_leaves_its_figures_and_can_be_scored(runs):
    outcome = runs.run("--suffix", ".try", train__num_epochs=3, launcher="horovodrun")
    assert outcome.status == 0, outcome.output[-5000:]
    assert "configs.train.num_epochs = 3" in outcome.output
    folder, result = runs.folder(), runs.result()
    assert folder.name == "digits.resnet20+dgc.wm5+dgc.fp16.np2.try"

    assert (result["epochs"], result["steps"], result["world_size"]) == (3, 24, 2)
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
    assert [x for x, _ in events["acc/test_top1"]] == [512, 1024, 1536]  # x axis: examples
    assert len(events["loss/train"]) == 24
    for tag in ("lr", "comm/density_asked", "comm/density_got", "comm/payload_bytes",
                "comm/sparse_bytes", "comm/hidden_share", "time/select_seconds",
                "time/merge_seconds", "time/step_seconds", "acc/test_top5"):  # fmt: skip
        assert events[tag], tag
    asked = [value for _, value in events["comm/density_asked"]]
    assert asked[0] == pytest.approx(0.1)
    assert asked[-1] == pytest.approx(0.01)

    scored = runs.run("--suffix", ".try", "--evaluate", train__num_epochs=3)
    assert scored.status == 0, scored.output[-5000:]
    top1 = float(re.search(r"acc/test_top1: ([\d.]+)", scored.output)[1])
    assert top1 == pytest.approx(result["metrics"]["acc/test_top1"]["best"], abs=1e-3)


def test_every_file_of_a_checkpoint_loads_with_weights_only(runs):
    assert runs.run().status == 0
    folder = runs.folder() / "checkpoints"
    parts = list(folder.glob("*.pt"))
    assert len(parts) == 6  # two steps, a shared part and two ranks' parts each
    for part in parts:
        assert torch.load(part, weights_only=True)
    shared = torch.load(max(folder.glob("*.shared.pt")), weights_only=True)
    assert shared["config"]["configs.train.num_epochs"] == 2
    assert not list(folder.glob("*.tmp"))


def test_all_launchers_end_with_the_same_parameters(runs):
    """Each run compares its ranks after every epoch; here the runs are compared."""
    hashes = set()
    for number, launcher in enumerate(jobs.LAUNCHERS):
        outcome = runs.run(launcher=launcher, runs=f"runs{number}")
        assert outcome.status == 0, outcome.output[-5000:]
        hashes.add(runs.result(f"runs{number}")["parameter_hash"])
    assert len(hashes) == 1


def test_accumulation_loaders_and_per_step_schedules_work_together(runs):
    outcome = runs.run(
        train__micro_batches_per_step=2,
        train__batch_size_per_rank=16,
        train__schedule_lr_per="step",
        train__weight_decay_on_batch_norm=False,
        data__num_workers_per_rank=1,
        checkpoint__every_steps=3,
    )
    assert outcome.status == 0, outcome.output[-5000:]
    assert runs.result()["steps"] == 16
    last_lr = read_scalars(runs.folder())["lr"][-1][1]
    assert 0 < last_lr < 0.05 * 4  # 4 micro-batches make the global batch; the cosine has begun


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--configs.train.num_epoch", "3"], "did you mean 'num_epochs'?"),
        (["--configs.train.optimizer.lr=-1"], "Invalid learning rate"),
        (["--configs.model.num_clases", "10"], "num_clases"),
        (["--devices", "gpu"], "torch sees no GPU"),
        (["--evaluate"], "Train first"),
    ],
)  # fmt: skip
def test_mistakes_end_the_job_with_a_message(runs, words, complaint):
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outcome = runs.run(*words, configs=[*SPARSE])
    assert outcome.status != 0
    assert complaint in outcome.output


def test_a_missing_data_folder_is_named_with_the_remedy(runs, tmp_path):
    configs = ["--configs", "configs/imagenet/resnet50.py", "--configs.dataset.root", str(tmp_path)]
    outcome = runs.run(configs=configs)
    assert outcome.status != 0
    assert f"there is no folder {tmp_path}/train" in outcome.output
    assert "--configs.dataset.root" in outcome.output
    assert "Traceback" not in outcome.output


def test_going_on_with_other_settings_is_refused(runs):
    assert runs.run().status == 0
    outcome = runs.run(train__optimizer__lr=0.07)
    assert outcome.status != 0
    assert "configs.train.optimizer.lr: 0.05 against 0.07" in outcome.output
    assert "--suffix" in outcome.output


def test_a_complete_run_says_so_and_keeps_its_result(runs):
    assert runs.run(configs=DIGITS, train__num_epochs=1).status == 0
    before = runs.result()
    outcome = runs.run(configs=DIGITS, train__num_epochs=1)
    assert "this run is complete" in outcome.output
    assert runs.result() == before
    (runs.folder() / "result.json").unlink()  # as if it had been killed just before writing it
    assert runs.run(configs=DIGITS, train__num_epochs=1).status == 0
    after = runs.result()
    for key in ("parameter_hash", "metrics", "seconds_per_step", "payload_bytes_per_step"):
        assert after[key] == before[key]
    # The checkpoint knows the peak up to itself; a process that trains nothing is far below it.
    assert after["peak_memory_bytes"] > 0.95 * before["peak_memory_bytes"]
