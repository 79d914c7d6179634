"""ResNet-110 for CIFAR-10."""

import fiddle as fdl

from configs.schema import Run
from workloads.models import resnet110


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(resnet110, num_classes=10)
