"""Entries are selected by residual / sqrt(second moment), not by the residual itself.

Needs an optimizer of configs/optim that keeps a second moment, other than adam.py.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.select_by = "preconditioned"
