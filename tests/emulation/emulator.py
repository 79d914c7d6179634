"""A launcher that runs the CUDA sources on the CPU, in place of CuPy's; see emulation.cpp."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from parsimony_kernels.runtime import launch as launch_cupy
from parsimony_kernels.runtime.build import cache_folder, keep

FOLDER = Path(__file__).parent
KERNELS = Path(launch_cupy.__file__).parents[1]
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
WATCHED = "PARSIMONY_TEST_UNDER_ASAN"  # set in the environment where AddressSanitizer is loaded
FORWARD, BACKWARD = 0, 1  # orders of threads and blocks; any other number seeds a shuffle


class Emulator:
    """Runs kernels on the CPU with the threads in this order, and counts launches by name."""

    def __init__(self, order: int = FORWARD, flags: tuple[str, ...] = ()) -> None:
        self.order = order
        self.launches: dict[str, int] = {}
        self._library = _library(flags)

    def launch(
        self, name: str, num_blocks: int, argument: ctypes.Structure, device: torch.device
    ) -> None:
        assert device.type == "cpu"
        self.launches[name] = self.launches.get(name, 0) + 1
        error = self._library.emulate(
            getattr(self._library, name),
            ctypes.byref(argument), num_blocks, launch_cupy.THREADS, self.order,
        )  # fmt: skip
        assert not error, f"{name}: {error.decode()}"


@functools.cache
def _library(flags: tuple[str, ...]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(flags)))
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64),
    ]
    return library


def build(flags: tuple[str, ...]) -> Path:
    """Compile, unless that was done before, and return the library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("emulating CUDA needs g++")
    words = [compiler, *FLAGS, *WARNINGS, *launch_cupy.DEFINES, *flags, f"-I{KERNELS}"]
    sources = [FOLDER / "emulation.cpp", FOLDER / "cuda.h"]
    content = repr(words) + "".join(path.read_text() for path in sources) + launch_cupy.source()
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    library = cache_folder().parent / "emulation" / digest / "emulation.so"
    if not library.exists():
        command = [*words, str(sources[0]), "-o"]
        keep(library, lambda new: subprocess.run([*command, str(new)], check=True, timeout=200))
    return library
