"""SM3 with momentum: covers that forget (beta), a momentum buffer, and nothing else."""

import fiddle as fdl

from configs.schema import Run
from optim import SM3


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        SM3, lr=0.01, momentum=0.9, beta=0.999, decoupled_weight_decay=True
    )
