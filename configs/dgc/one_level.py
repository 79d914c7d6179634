"""Exchange gradients between all ranks in one way, whether or not they are on the same node."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.two_level = False
