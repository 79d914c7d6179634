"""torch's fused AdamW, with full moments: the others are compared with it."""

import fiddle as fdl
from torch.optim import AdamW

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(AdamW, lr=1e-3, weight_decay=0.0, fused=True)
