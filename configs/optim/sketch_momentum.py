"""SGD with its momentum in a count-sketch."""

import fiddle as fdl

from configs.schema import Run
from optim import SketchMomentum


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        SketchMomentum, lr=0.05, momentum=0.9, decoupled_weight_decay=True
    )
