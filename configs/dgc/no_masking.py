"""No momentum factor masking."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.mask_velocity = False
