"""How the CUDA kernels are compiled and launched: by CuPy, at the first launch.

Compiled code is kept in ~/.cache/parsimony/kernels (XDG_CACHE_HOME moves it). Its name is a hash of
the sources, the options and the GPU's architecture, and the version of the compiler, NVRTC. A
machine without NVRTC takes code that any version made.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from parsimony_kernels.runtime.build import cache_folder, keep, kept
from parsimony_kernels.runtime.sources import joined
from parsimony_kernels.runtime.streams import raw_stream

THREADS = 256  # in a block
COLUMNS = 4  # of each of its rows, for a thread
DEFINES = (f"-DTHREADS={THREADS}", f"-DCOLUMNS={COLUMNS}")
# No product may be fused with a sum, numbers close to 0 stay, and quotients and roots are IEEE's.
ARITHMETIC = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
OPTIONS = ("--std=c++14", *DEFINES, *ARITHMETIC)

ENTRY = "runtime/kernels.cu"

_REMEDY = (
    "launch/setup.sh installs what is needed beside a GPU; PARSIMONY_KERNELS=reference runs plain "
    "torch instead"
)


class Launcher(Protocol):
    def launch(
        self, name: str, num_blocks: int, argument: ctypes.Structure, device: torch.device
    ) -> None:
        """Run `name` in num_blocks blocks of THREADS threads; `argument` is passed by value."""


class CuPyLauncher:
    """Launches on torch's current stream of the device."""

    def launch(
        self, name: str, num_blocks: int, argument: ctypes.Structure, device: torch.device
    ) -> None:
        current = torch.cuda.current_device()
        if device.index not in (None, current):
            with torch.cuda.device(device):
                return self.launch(name, num_blocks, argument, device)
        _bind_thread(current)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        # What CuPy's own kernels call, too, after 10 microseconds of looking at arguments.
        _cupy().cuda.driver.launchKernel(
            _kernel(name, current), num_blocks, 1, 1, THREADS, 1, 1,
            0, raw_stream(device), ctypes.addressof(parameters), 0,
        )  # fmt: skip


class Argument(ctypes.Structure):
    """A kernel's one argument. Keeps the tensors that it points to."""

    def point(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.data_ptr())
        self.kept = {**getattr(self, "kept", {}), **tensors}


class Batch(Argument):
    """Tensors for which one launch works; see abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("steps", "ends")),
        ("count", ctypes.c_int64),
    )


launcher: Launcher = CuPyLauncher()  # tests put an emulator here


def launch(name: str, num_blocks: int, argument: Argument, device: torch.device) -> None:
    """Run the kernel `name` with the launcher."""
    launcher.launch(name, num_blocks, argument, device)


def source() -> str:
    """Return all CUDA sources as one text."""
    return joined(ENTRY)


@functools.cache
def _cupy():
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CUDA kernels need cupy, which does not import: {_REMEDY}") from error
    return cupy


_thread = threading.local()


def _bind_thread(device_index: int) -> None:
    """Give a thread that has never used the device its context, which launches take for granted."""
    bound = _thread.__dict__.setdefault("bound", set())
    if device_index not in bound:
        _cupy().cuda.runtime.setDevice(device_index)
        bound.add(device_index)


@functools.cache
def _kernel(name: str, device_index: int) -> int:
    return _cupy().cuda.driver.moduleGetFunction(_module(device_index), name)


@functools.cache
def _module(device_index: int) -> int:
    """Load the kernels for the current device, which is the one of this index."""
    _bind_thread(device_index)
    major, minor = torch.cuda.get_device_capability(device_index)
    return _cupy().cuda.driver.moduleLoad(str(_compiled(f"{major}.{minor}")))


def _compiled(capability: str) -> Path:
    """Return the file of compiled code for the current device, made at the first call.

    Not CuPy's own compilation: it appends -ftz=true, and NVRTC obeys its last option.
    """
    cuda = _cupy().cuda
    key = hashlib.sha256(repr((source(), OPTIONS, capability)).encode()).hexdigest()[:20]
    try:
        version = "-".join(map(str, cuda.nvrtc.getVersion()))
    except Exception as error:  # CuPy's, of several kinds
        found = kept(f"device-{key}-*.cubin")
        if found:
            return found[-1]
        raise RuntimeError(
            f"NVRTC, which compiles the CUDA kernels, is not there: {error}. {_REMEDY}"
        ) from error
    path = cache_folder() / f"device-{key}-{version}.cubin"
    if path in kept(path.name):
        return path
    try:
        code, _ = cuda.compiler.compile_using_nvrtc(source(), options=OPTIONS)
    except cuda.compiler.CompileException as error:
        raise RuntimeError(
            f"{ENTRY} does not compile for capability {capability}: {error}\n{_REMEDY}"
        ) from error
    keep(path, lambda new: new.write_bytes(code))
    return path
