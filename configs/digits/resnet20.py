"""ResNet-20 on 8 x 8 digits: seconds an epoch on two cores."""

import fiddle as fdl

from configs.schema import Run
from workloads.models import resnet20


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(resnet20, num_classes=10, in_channels=1)
