"""SGD with a full momentum that also takes row-sparse gradients; compare sketch_momentum.py."""

import fiddle as fdl

from configs.schema import Run
from optim import Momentum


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(Momentum, lr=0.05, momentum=0.9, decoupled_weight_decay=True)
