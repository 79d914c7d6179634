"""The optimizer alone keeps the second moment, of what arrives; workers keep none."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.preconditioning = "after"
