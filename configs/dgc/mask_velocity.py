"""Momentum factor masking: an entry's velocity is forgotten when it is sent."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.mask_velocity = True
