"""VGG-16 with batch norm for ImageNet."""

import fiddle as fdl

from configs.schema import Run
from workloads.vision import torchvision


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(torchvision.models.vgg16_bn, num_classes=1000)
