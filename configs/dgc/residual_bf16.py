"""The residual in two bytes an element."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.residual_dtype = "bfloat16"
