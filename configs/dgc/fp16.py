"""Values of 16 bits; what rounding takes off stays in the residual."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.value_dtype = "float16"
