"""A cosine in place of the steps; list it after a model."""

import fiddle as fdl
import torch

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.train.scheduler = fdl.Partial(torch.optim.lr_scheduler.CosineAnnealingLR)
