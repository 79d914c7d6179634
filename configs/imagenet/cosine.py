"""The rate falls along a cosine instead of in steps; list this file after a model's."""

import fiddle as fdl
import torch

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.scheduler = fdl.Partial(torch.optim.lr_scheduler.CosineAnnealingLR)
