"""The residual in one byte an element, with a scale for each 256."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.residual_dtype = "int8"
