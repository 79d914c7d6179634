"""Lets `import torchvision` work beside a torch that its compiled library does not fit.

torchvision's wheel on the package index is linked against CUDA. Beside a CPU build of torch its
library cannot be loaded, and the import then fails over two operators of object detection that
have no schema. Defining the schemas, and no more, lets its models, datasets and transforms work;
where the library loads, nothing is defined.

Importing this module makes it hold for every later `import torchvision` of the process, whoever
writes it. launch/setup.sh copies this file into the environment and has each Python import it at
its start: it is on its own, and costs nothing until torchvision is imported.
"""

import importlib.machinery
import sys

_kept = []  # torch takes an operator back when the library object that defined it dies


class TorchvisionFinder:
    """Finds torchvision where Python does, and sees to its operators before it runs."""

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


if all(type(finder).__name__ != "TorchvisionFinder" for finder in sys.meta_path):  # the copy's too
    sys.meta_path.insert(0, TorchvisionFinder())
