"""ResNet-20 for CIFAR-10."""

import fiddle as fdl

from configs.schema import Run
from workloads.models import resnet20


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(resnet20, num_classes=10)
