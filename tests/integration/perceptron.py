"""A config of a small model that is quick in 16 bits on a CPU too; used by test_optimizers.py."""

import fiddle as fdl
from torch import nn

from configs.schema import Run


def perceptron() -> nn.Module:
    layers = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(perceptron)
