"""The learning rate that SM3's authors advise, and Polyak averaging, their other advice.

The rate rises with the square of the step, stays, and falls linearly over the last tenth. An
average of the parameters is evaluated.
"""

import fiddle as fdl

from configs.schema import Run
from optim import QuadraticWarmupLinearCooldown


def configure(run: fdl.Config[Run]) -> None:
    run.train.lr_warmup_epochs = 0
    run.train.scheduler = fdl.Partial(QuadraticWarmupLinearCooldown)
    run.train.schedule_lr_per = "step"
    run.train.polyak_decay = 0.99
