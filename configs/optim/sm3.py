"""SM3 with a full momentum; its accumulators forget with beta."""

import fiddle as fdl

from configs.schema import Run
from optim import SM3


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        SM3, lr=0.01, momentum=0.9, beta=0.999, decoupled_weight_decay=True
    )
