"""Sketches and covers for embedding and softmax only, as in the count-sketch paper.

What lies between, and the softmax's bias, keep full state. List it after the optimizer's file.
"""

import fiddle as fdl

from configs.schema import Run

_FULL = {"min_compressed_numel": 2**62}  # more elements than a tensor has


def configure(run: fdl.Config[Run]) -> None:
    run.train.param_groups = {"layers.*": _FULL}
    if run.model.softmax == "sampled":
        run.train.param_groups["softmax.bias.weight"] = _FULL  # a table of one column
