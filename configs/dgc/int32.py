"""Indices are sent in 32 bits: the default here, where the predecessors sent 64."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.index_coding = "int32"
