"""Make `import torchvision` work where its compiled library does not fit the installed torch.

torchvision's wheel on the package index is linked against CUDA. Beside a CPU build of torch its
library cannot be loaded, and the import then fails because two operators of object detection have
no schema. This module defines the two schemas, which is enough for torchvision's models, datasets
and transforms. If the library can be loaded, it defines nothing.

Importing this module affects every later `import torchvision` of the process. launch/setup.sh
copies this file into the environment, where each Python imports it at its start. So it imports
nothing of this repository, and does nothing until torchvision is imported.
"""

import importlib.machinery
import sys

_kept = []  # keeps the library objects alive: torch removes their operators when they die


class TorchvisionFinder:
    """Finds torchvision where Python does, and defines its missing operators before it runs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.has_location:
            execute = spec.loader.exec_module

            def exec_module(module):
                _define_missing_operators(spec.submodule_search_locations[0])
                execute(module)

            spec.loader.exec_module = exec_module
        return spec


def _define_missing_operators(folder):
    import torch

    try:
        torch.ops.load_library(f"{folder}/_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


# by name, because the copy in the environment has a class of its own
if all(type(finder).__name__ != "TorchvisionFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, TorchvisionFinder())
