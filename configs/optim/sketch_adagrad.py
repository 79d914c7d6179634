"""Adagrad in a count-min sketch."""

import fiddle as fdl

from configs.schema import Run
from optim import SketchAdagrad


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(SketchAdagrad, lr=0.01, decoupled_weight_decay=True)
