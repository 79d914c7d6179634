"""Second moments are averaged over workers, as often as at most doubles the bytes sent.

Needs an optimizer of configs/optim that keeps a second moment, other than adam.py.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.share_statistics = 1.0
