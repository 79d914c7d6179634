"""Which optimizer, and how its state is kept. List these files after those of a model.

They replace the optimizer that a model's file chose, with its rate and weight decay. The rates are
ones to start from: tune them. Weight decay, if one is set, is decoupled.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.scale_lr_by_workers = False  # the linear rule is SGD's
