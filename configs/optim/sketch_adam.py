"""Adam with both moments in sketches of a fifth of their size (CS-MV)."""

import fiddle as fdl

from configs.schema import Run
from optim import SketchAdam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(SketchAdam, lr=1e-3, decoupled_weight_decay=True)
