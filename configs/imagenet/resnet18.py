"""ResNet-18 for ImageNet, with Nesterov momentum and no weight decay on batch norm."""

import fiddle as fdl

from configs.schema import Run
from workloads.vision import torchvision


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(torchvision.models.resnet18, num_classes=1000, zero_init_residual=True)
    run.train.optimizer.weight_decay = 1e-4
    run.train.optimizer.nesterov = True
    run.train.weight_decay_on_batch_norm = False
