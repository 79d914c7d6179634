"""No density warm-up."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.density_warmup_epochs = 0
    run.dgc.density_warmup = None
