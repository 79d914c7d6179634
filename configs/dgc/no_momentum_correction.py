"""SGD's momentum stays in SGD, where it acts on what arrives; workers keep no velocity."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.momentum_correction = False
