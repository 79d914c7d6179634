"""Values are sent in 8 bits, with a scale for each 32; an index takes about 12 bits.

That is 2.5 bytes an entry at density 0.1%. The rounding error stays in the residual.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.value_dtype = "mxfp8"
    run.dgc.index_coding = "elias_fano"
