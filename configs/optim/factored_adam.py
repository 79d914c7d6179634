"""Adam without a first moment; its second is kept as row and column means: almost no state."""

import fiddle as fdl

from configs.schema import Run
from optim import FactoredAdam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        FactoredAdam, lr=1e-3, betas=(0.0, 0.999), decoupled_weight_decay=True
    )
