"""Adam with its second moment in a sketch (CS-V)."""

import fiddle as fdl

from configs.schema import Run
from optim import SketchAdam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        SketchAdam, lr=1e-3, first_moment="full", decoupled_weight_decay=True
    )
