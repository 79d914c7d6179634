"""Which optimizer, and how its state is kept. List these files after those of a model.

They replace the optimizer of the model's file, including its rate and weight decay. The rates are
starting points: tune them. Weight decay, if you set one, is decoupled.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.scale_lr_by_workers = False  # the linear rule is SGD's
