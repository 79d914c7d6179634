"""Adam with full moments that takes row-sparse gradients; rows without one do not change."""

import fiddle as fdl

from configs.schema import Run
from optim import Adam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(Adam, lr=1e-3, decoupled_weight_decay=True)
