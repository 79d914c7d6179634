"""Adam whose second moment is SM3's cover."""

import fiddle as fdl

from configs.schema import Run
from optim import SM3Adam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(SM3Adam, lr=3e-3, decoupled_weight_decay=True)
