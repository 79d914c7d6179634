"""The velocity, where workers keep one, in two bytes an element."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.velocity_dtype = "bfloat16"
