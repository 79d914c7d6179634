"""Files of configs/optim in real runs: with a sparse exchange, killed and taken up again."""

import time

import pytest

from tests.integration.conftest import SHORT, SPARSE

pytestmark = pytest.mark.integration
SETTINGS = {name.replace(".", "__"): value for name, value in SHORT.items()} | {
    "checkpoint__every_steps": 2,
    "train__num_epochs": 3,
}
METHODS = {
    "SM3, its rate and its averaging": ["sm3", "warmup_cooldown"],
    "both of Adam's moments in sketches": ["sketch_adam"],
}


@pytest.mark.parametrize("names", METHODS.values(), ids=METHODS)
def test_a_killed_run_with_small_state_resumes_to_the_same_bits(runs, tmp_path, names):
    configs = [*SPARSE, *(f"configs/optim/{name}.py" for name in names)]
    settings = dict(SETTINGS)
    if "warmup_cooldown" in names:
        del settings["train__lr_warmup_epochs"]
    straight = runs.run(configs=configs, runs="straight", **settings)
    assert straight.status == 0, straight.output[-5000:]

    job = runs.start(configs=configs, **settings)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("*/checkpoints/step-00000014.json")):
        assert job.is_running and time.monotonic() < deadline, "it was to be killed in mid-epoch"
        time.sleep(0.005)
    job.kill()
    resumed = runs.run(configs=configs, **settings)
    assert "resuming after step" in resumed.output, resumed.output[-5000:]

    one, other = runs.result("straight"), runs.result()
    assert one["parameter_hash"] == other["parameter_hash"]
    assert one["metrics"] == other["metrics"]  # of the average, where there is one
    assert one["metrics"]["loss/train"]["last"] < 2.25  # guessing: 2.3
    assert 0 < one["state_bytes"]["optimizer"] < 1.1 * one["state_bytes"]["parameters"]
    averaged = one["state_bytes"]["parameters"] if "warmup_cooldown" in names else 0
    assert one["state_bytes"]["averaged"] == averaged
