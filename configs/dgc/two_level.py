"""Sum gradients densely within a node, then exchange the sums sparsely between nodes.

Each rank of a node exchanges its own part of the node's sums.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.two_level = True
