"""Every optimizer of configs/optim with every file of configs/dgc: it trains, or says why not."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from configs import load
from dgc import DistributedOptimizer
from dgc.comm.local import run_local

ROOT = Path(__file__).parents[3] / "configs"
DIGITS = ROOT / "digits/resnet20.py"
NUM_STEPS = 2


def names(folder):
    return sorted(path.stem for path in (ROOT / folder).glob("[a-z]*.py"))


def _make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 5))


INITIAL = _make_model()  # here, since workers are threads that share torch's random state


def train(run, comm):
    """Return the parameters after some steps of the run's optimizer on data of this rank."""
    model = copy.deepcopy(INITIAL)
    optimizer = DistributedOptimizer(
        run.train.optimizer(model.parameters()), model.named_parameters(), comm=comm,
        compression=run.dgc, seed=run.seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(NUM_STEPS):
        inputs = torch.randn(8, 64, generator=generator)
        nn.functional.cross_entropy(model(inputs), inputs[:, :5].argmax(1)).backward()
        optimizer.step()
        assert optimizer.stats.skipped is None
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def outcome(optim, dgc):
    files = [DIGITS, ROOT / f"optim/{optim}.py", ROOT / f"dgc/{dgc}.py"]
    run = load.build(load.compose(files, {}))
    one, other = run_local(2, lambda comm: train(run, comm))
    return one, other


# optimizer of configs/optim -> files of configs/dgc that it refuses; all others it goes with.
# adam and sgd are torch's, warmup_cooldown and words_only keep the model's SGD, and the others have
# a momentum alone: they hand no second moment over.
_NO_SECOND_MOMENT = ["early", "select_preconditioned", "shared_statistics"]
REFUSED = {"parsimony": ["after"]} | dict.fromkeys(
    ("adam", "sgd", "momentum", "sketch_momentum", "warmup_cooldown", "words_only"),
    _NO_SECOND_MOMENT,
)
REASONS = {  # the setting, its value, why not, the remedy
    "after": "update_scale is 4.0, .*divides it out again; leave it at 1",
    "early": "preconditioning is 'early', .* no second moment .*; use an optimizer of optim",
    "select_preconditioned": "select_by is 'preconditioned', .*: leave it at 'raw'",
    "shared_statistics": "share_statistics is 1.0, .*: leave it at 0.0",
}


@pytest.mark.parametrize("optim", names("optim"))
def test_replicas_stay_equal_with_every_compression_that_is_not_refused(optim, is_long):
    """In the short suite with every fourth, from another one on for each optimizer."""
    chosen = names("dgc") if is_long else names("dgc")[names("optim").index(optim) % 4 :: 4]
    for dgc in chosen:
        if dgc not in REFUSED.get(optim, []):
            one, other = outcome(optim, dgc)
            for mine, theirs, initial in zip(one, other, INITIAL.parameters(), strict=True):
                assert torch.equal(mine, theirs), dgc
                assert not torch.equal(mine, initial), dgc


@pytest.mark.parametrize("optim, dgc", [(o, d) for o, names in REFUSED.items() for d in names])
def test_what_is_refused_is_told_with_the_remedy(optim, dgc):
    with pytest.raises(ValueError, match=REASONS[dgc]):
        outcome(optim, dgc)


@pytest.mark.parametrize("dgc", ["wm5", "fp16", "density_1_percent", "early"])
def test_the_recommended_method_may_come_before_or_after_compressions_files(dgc):
    parsimony, other = ROOT / "optim/parsimony.py", ROOT / f"dgc/{dgc}.py"
    flat = load.flatten(load.compose([DIGITS, parsimony, other], {}))
    assert load.flatten(load.compose([other, DIGITS, parsimony], {})) == flat
    assert flat["configs.dgc.residual_dtype"] == "bfloat16"
    assert flat["configs.dgc.clip_scope"] == "tensor"


def test_the_last_residual_listed_counts():
    files = [DIGITS, ROOT / "optim/parsimony.py", ROOT / "dgc/residual_8bit.py"]
    assert load.build(load.compose(files, {})).dgc.residual_dtype == "int8"
