"""The velocity, where workers keep one, in one byte an element, with a scale for each 256."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.velocity_dtype = "int8"
