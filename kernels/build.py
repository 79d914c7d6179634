"""Compile the C++ once for this machine and load it, with torch's own OpenMP threads.

The library is kept in ~/.cache/parsimony/kernels (XDG_CACHE_HOME moves it), under a name made of
the sources, the compiler, its options and the processor: a change in any makes a new one.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = ("host.cpp", "host_buffers.cpp", "host_packing.cpp", "host_merge.cpp")
HEADERS = ("common.h", "float_mode.h", "packing.h")
# No contraction: a product and a sum stay two roundings, as in the specification. What is allowed
# (no errno, no traps) changes no result, and lets roots and quotients be vectorised.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# No unswitching: of the two versions of a loop that it makes, g++ vectorises but one.
SPEED = ("-O3", "-march=native", "-fno-unswitch-loops", "-fopenmp")
OPTIONS = ("-std=c++17", *SPEED, *ARITHMETIC, "-fPIC", "-shared", "-Wall")
REMEDY = (
    "Install g++ or clang++ (CXX names it), or choose the plain torch implementation with "
    "PARSIMONY_KERNELS=reference"
)


@functools.cache
def host_library() -> ctypes.CDLL:
    """Return the compiled SOURCES, compiling them if this machine has not yet.

    Raises: RuntimeError with the compiler's words and the remedy.
    """
    _share_openmp()
    path = cache_folder() / f"host-{_key()}.so"
    if not path.exists():
        _compile(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"cannot load the compiled kernels: {error}. Set XDG_CACHE_HOME to a folder from which "
            "programs may run, or remove the file"
        ) from error


def compiler() -> str:
    """Return the C++ compiler that would be used. Raises: RuntimeError if there is none."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    missing = f"CXX is {chosen!r}, which is no command" if chosen else "no C++ compiler found"
    raise RuntimeError(f"{missing}: the native kernels need one. {REMEDY}")


def cache_folder() -> Path:
    """Return where compiled kernels are kept; it need not be there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "parsimony" / "kernels"


def _key() -> str:
    sources = b"".join((HERE / name).read_bytes() for name in (*HEADERS, *SOURCES))
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout
    parts = (sources, version, " ".join(OPTIONS).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> str:
    """Name what -march=native stands for: a cache in a shared home serves machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    seen = dict(line.split(":", 1) for line in lines if line.startswith(wanted))
    return platform.machine() + repr(sorted(seen.items()))


def _compile(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError as error:
        raise RuntimeError(
            f"cannot keep the compiled kernels in {path.parent}: {error}. Set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a job start together; one of them compiles
        if path.exists():
            return
        new = path.with_suffix(f".new.{os.getpid()}")
        sources = [str(HERE / name) for name in SOURCES]
        command = [compiler(), *OPTIONS, "-o", str(new), *sources]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-2000:]}\n{REMEDY}")
        new.rename(path)


def _share_openmp() -> None:
    """Let the library find the OpenMP that torch loaded, so that both use the same threads.

    With a second OpenMP each would keep a team of its own, and the idle one spins where the other
    works.
    """
    maps = Path("/proc/self/maps")
    loaded = maps.read_text().split() if maps.exists() else []
    names = {
        path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))
    }
    from_torch = sorted(name for name in names if str(Path(torch.__file__).parent) in name)
    for name in from_torch or sorted(names):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
