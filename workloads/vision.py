"""Import torchvision, whether or not its compiled operators fit the installed torch.

A plain `import torchvision` does the same in an environment that launch/setup.sh made, and in
config files. Elsewhere write `from workloads.vision import torchvision`.
"""

import workloads.torchvision_import  # noqa: F401

try:
    import torchvision
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; run launch/setup.sh", name=error.name) from error

import torchvision.datasets
import torchvision.models
import torchvision.transforms.v2

__all__ = ["torchvision"]
