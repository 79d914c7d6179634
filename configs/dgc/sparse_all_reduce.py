"""Owners of slices sum the entries: what a rank sends does not grow with the number of ranks."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.protocol = "sparse_all_reduce"
