"""Workers average their second moments, as often as can be done with as many bytes again.

Needs an optimizer of configs/optim that keeps a second moment, other than adam.py.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.share_statistics = 1.0
