"""Every rank sends its entries to all others, whatever the cost model says."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.protocol = "gather"
