"""Sketches and covers for embedding and softmax only, as in the count-sketch paper.

The layers between them and the softmax's bias have full state. For the optimizers of optim/.
"""

import fiddle as fdl

from configs.schema import Run

_FULL = {"min_compressed_numel": 2**62}  # more elements than a tensor has


def configure(run: fdl.Config[Run]) -> None:
    run.train.param_groups = {"layers.*": _FULL, "softmax.*bias*": _FULL}
