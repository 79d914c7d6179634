"""Deep Gradient Compression: 0.1% of the entries, momentum corrected and masked.

List these files after or before those of a model; SGD's momentum moves into the correction.
"""

import fiddle as fdl

from configs.schema import Run
from dgc import Compression


def configure(run: fdl.Config[Run]) -> None:
    if run.dgc is None:  # configs/optim/parsimony.py may have come first
        run.dgc = fdl.Config(Compression, density=0.001)
