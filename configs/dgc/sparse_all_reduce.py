"""Each rank owns a part of every bucket, to which the others send their entries to be summed.

So the bytes that a rank sends do not grow with the number of ranks.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.protocol = "sparse_all_reduce"
