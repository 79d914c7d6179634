"""Indices of 32 bits. (The default here; the predecessors' was 64.)"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.index_coding = "int32"
