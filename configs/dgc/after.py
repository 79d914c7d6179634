"""Only the optimizer keeps a second moment, of the entries that arrive; workers keep none."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.preconditioning = "after"
