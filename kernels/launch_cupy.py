"""How kernels of device.cu are compiled and launched: by CuPy, when the first is launched."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    import cupy

THREADS = 256  # in a block
COLUMNS = 4  # that a thread has of each of its rows
DEFINES = (f"-DTHREADS={THREADS}", f"-DCOLUMNS={COLUMNS}")
# No product may be fused with a sum; division and square root stay IEEE's. See device.cu.
ARITHMETIC = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
OPTIONS = ("--std=c++14", *DEFINES, *ARITHMETIC)

_FOLDER = Path(__file__).parent
_REMEDY = (
    "launch/setup.sh installs what is needed beside a GPU; PARSIMONY_KERNELS=reference runs plain "
    "torch instead"
)


class Launcher(Protocol):
    def launch(
        self, name: str, num_blocks: int, argument: ctypes.Structure, device: torch.device
    ) -> None:
        """Run `name` in num_blocks blocks of THREADS threads; `argument` is passed by value."""


def source() -> str:
    """Return device.cu with common.h in it: CuPy's cache looks at the source, not at headers."""
    header = (_FOLDER / "common.h").read_text().replace("#pragma once", "")
    return (_FOLDER / "device.cu").read_text().replace('#include "common.h"', header)


class CuPyLauncher:
    """Compiles for a device at its first launch; CuPy keeps the binaries, in memory and on disk."""

    def launch(
        self, name: str, num_blocks: int, argument: ctypes.Structure, device: torch.device
    ) -> None:
        import numpy

        # CuPy passes an array of one entry by value, whatever the entry's type.
        value = numpy.ndarray((1,), dtype=f"V{ctypes.sizeof(argument)}", buffer=argument)
        with torch.cuda.device(device):
            kernel = _kernel(name, torch.cuda.current_device())
            with _cupy().cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                kernel((num_blocks,), (THREADS,), (value,))


@functools.cache
def _cupy():
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CUDA kernels need cupy, which does not import: {_REMEDY}") from error
    return cupy


@functools.cache
def _kernel(name: str, device_index: int) -> cupy.RawKernel:
    return _module(device_index).get_function(name)


@functools.cache
def _module(device_index: int) -> cupy.RawModule:
    """Compile for the current device, which is the one of this index."""
    cupy = _cupy()
    module = cupy.RawModule(code=source(), options=OPTIONS)
    try:
        module.compile()
    except cupy.cuda.compiler.CompileException as error:
        gpu = torch.cuda.get_device_name(device_index)
        raise RuntimeError(f"kernels/device.cu fails for {gpu}: {error}. {_REMEDY}") from error
    return module
