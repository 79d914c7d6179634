"""Deep Gradient Compression: 0.1% of the entries, momentum corrected and masked.

These files may come after or before those of a model. SGD's momentum then acts in the workers, on
the gradients that they accumulate, instead of in SGD.
"""

import fiddle as fdl

from configs.schema import Run
from dgc import Compression


def configure(run: fdl.Config[Run]) -> None:
    if run.dgc is None:  # configs/optim/parsimony.py may have come first
        run.dgc = fdl.Config(Compression, density=0.001)
