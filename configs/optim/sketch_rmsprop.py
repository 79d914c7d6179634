"""RMSprop in a count-min sketch: no first moment (CMS-RMSprop)."""

import fiddle as fdl

from configs.schema import Run
from optim import SketchRMSprop


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(SketchRMSprop, lr=1e-3, decoupled_weight_decay=True)
