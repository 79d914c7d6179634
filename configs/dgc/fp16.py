"""Values are sent in 16 bits; the rounding error stays in the residual."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.value_dtype = "float16"
