"""ImageNet, 90 epochs, as Deep Gradient Compression's authors train on it."""

import fiddle as fdl
import torch

from configs.schema import Run
from workloads.datasets import imagenet


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(imagenet, root="data/imagenet")
    run.data.num_workers_per_rank = 4

    run.train.num_epochs = 90
    run.train.batch_size_per_rank = 32
    run.train.optimizer.lr = 0.0125
    run.train.optimizer.weight_decay = 5e-5
    run.train.scheduler = fdl.Partial(
        torch.optim.lr_scheduler.MultiStepLR,
        milestones=[30 - 5, 60 - 5, 80 - 5],  # counted from the end of the 5 warm-up epochs
        gamma=0.1,
    )
    run.checkpoint.every_steps = 2000
