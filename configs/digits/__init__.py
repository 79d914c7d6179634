"""Scikit-learn's handwritten digits: 1,437 images to train on, 360 to test; in its wheel."""

import fiddle as fdl
import torch

from configs.schema import Run
from workloads.datasets import digits


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(digits)
    run.data.num_workers_per_rank = 0  # the images are in memory

    run.train.num_epochs = 30
    run.train.batch_size_per_rank = 32
    run.train.optimizer.lr = 0.05
    run.train.optimizer.weight_decay = 1e-4
    run.train.lr_warmup_epochs = 5
    run.train.scheduler = fdl.Partial(torch.optim.lr_scheduler.CosineAnnealingLR)
