"""torch's SGD with momentum 0.9; together with a file of configs/dgc, DGC as published.

It takes dense gradients; momentum.py takes row-sparse ones too.
"""

import fiddle as fdl
import torch

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(torch.optim.SGD, lr=0.05, momentum=0.9)
