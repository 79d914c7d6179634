"""Every optimizer of configs/optim with every file of configs/dgc: it trains, or says why not."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from configs import load
from dgc import DistributedOptimizer
from dgc.local import run_local

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
