"""The residual networks for small images, which torchvision does not have.

Source: He et al. 2016 (arXiv:1512.03385), section 4.2: 6n + 2 layers, 16, 32 and 64 channels,
shortcuts without parameters (their option A), Kaiming initialisation.
"""

from __future__ import annotations

from torch import Tensor, nn

from workloads.vision import torchvision


class _PaddedShortcut(nn.Module):
    """Halves height and width by taking every second pixel; fills the new channels with zeros."""

    def __init__(self, num_new_channels: int) -> None:
        super().__init__()
        self._before = num_new_channels // 2
        self._after = num_new_channels - self._before

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, self._before, self._after))


class SmallImageResNet(nn.Sequential):
    """A residual network of 6 * blocks_per_stage + 2 layers for images of 8 x 8 to 64 x 64 pixels.

    With 20 layers, 3 input channels and 10 classes it has 269,722 parameters; with a width of 48
    instead of 16 channels in the first stage, 2,412,730.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
    ) -> None:
        block = torchvision.models.resnet.BasicBlock
        channels = width
        stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        layers = [stem, nn.BatchNorm2d(channels), nn.ReLU()]
        for wanted in (width, 2 * width, 4 * width):
            for _ in range(blocks_per_stage):
                grows = wanted != channels
                shortcut = _PaddedShortcut(wanted - channels) if grows else None
                layers.append(block(channels, wanted, 2 if grows else 1, shortcut))
                channels = wanted
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> SmallImageResNet:
    return SmallImageResNet(3, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> SmallImageResNet:
    return SmallImageResNet(18, num_classes, in_channels)
