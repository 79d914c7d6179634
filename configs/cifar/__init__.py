"""CIFAR-10 as Deep Gradient Compression's authors train on it."""

import fiddle as fdl
import torch

from configs.schema import Run
from workloads.datasets import cifar10


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(cifar10, root="data/cifar10")

    run.train.num_epochs = 200
    run.train.batch_size_per_rank = 128
    run.train.optimizer.lr = 0.1
    run.train.optimizer.weight_decay = 1e-4
    run.train.scheduler = fdl.Partial(torch.optim.lr_scheduler.CosineAnnealingLR)
