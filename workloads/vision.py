"""torchvision, importable whether or not its compiled operators fit the installed torch.

torchvision's wheel on the package index is linked against CUDA. Beside a CPU build of torch its
library cannot be loaded, and its import then fails over two operators of object detection that
nothing here calls. Defining their schemas, and no more, lets its models, datasets and transforms
work. Import torchvision through this module: `from workloads.vision import torchvision`.
"""

import importlib.util
from pathlib import Path

import torch

_MISSING_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def _define_missing_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ModuleNotFoundError("torchvision is not installed; run launch/setup.sh")
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        _MISSING_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _MISSING_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_define_missing_operators()

import torchvision  # noqa: E402
import torchvision.datasets  # noqa: E402
import torchvision.models  # noqa: E402
import torchvision.transforms.v2  # noqa: E402

__all__ = ["torchvision"]
