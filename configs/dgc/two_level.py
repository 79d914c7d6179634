"""Sum densely within a node, exchange sparsely between nodes; each local rank has its share."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.two_level = True
