"""Five epochs of density warm-up, in which the density falls exponentially."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.density_warmup_epochs = 5
    run.dgc.density_warmup = None
