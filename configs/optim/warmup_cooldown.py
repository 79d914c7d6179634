"""The rate as SM3's authors advise: quadratic warm-up, constant, linear fall over the last tenth.

And Polyak averaging, their other advice: an average of the parameters is what is evaluated.
"""

import fiddle as fdl

from configs.schema import Run
from optim import QuadraticWarmupLinearCooldown


def configure(run: fdl.Config[Run]) -> None:
    run.train.lr_warmup_epochs = 0
    run.train.scheduler = fdl.Partial(QuadraticWarmupLinearCooldown)
    run.train.schedule_lr_per = "step"
    run.train.polyak_decay = 0.99
