"""Workers divide gradients by the root of their second moment before they accumulate them.

Needs an optimizer of configs/optim that keeps a second moment, other than adam.py.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.preconditioning = "early"
