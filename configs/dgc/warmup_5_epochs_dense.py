"""Five epochs at density 1, then sparse."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.density_warmup_epochs = 5
    run.dgc.density_warmup = [1.0, 1.0, 1.0, 1.0, 1.0]
