"""Compile the C++ once for this machine and load it, with torch's own OpenMP threads.

The library is kept in ~/.cache/parsimony/kernels (XDG_CACHE_HOME moves it). Its name is a hash of
the sources, the options, the processor and the compiler, so a change in any of them makes a new
library. A machine without a compiler takes a library that any compiler made there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from parsimony_kernels.runtime.sources import PACKAGE, joined
from parsimony_kernels.runtime.trust import is_ours, private_folder

SOURCES = (
    "runtime/watch.cpp", "step/host.cpp", "buffers/host.cpp", "packing/host.cpp",
    "packing/merge.cpp",
)  # fmt: skip
# A product and a sum must stay two roundings, as in the specification, so contraction is off. That
# nothing needs errno or traps changes no result, and lets g++ vectorise roots and quotients.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# Unswitching is off: where a condition in a loop does not change, g++ would make two versions of
# the loop, one for each outcome, and vectorise only one of them.
SPEED = ("-O3", "-march=native", "-fno-unswitch-loops", "-fopenmp")
OPTIONS = ("-std=c++17", *SPEED, *ARITHMETIC, "-fPIC", "-shared", "-Wall")
REMEDY = (
    "Install g++ or clang++ (CXX names it), or choose the plain torch implementation with "
    "PARSIMONY_KERNELS=reference"
)
PATIENCE = 300.0  # seconds for another process that compiles


@functools.cache
def host_library() -> ctypes.CDLL:
    """Return the compiled SOURCES; compile them if this machine has not yet.

    Raises: RuntimeError with the compiler's words and the remedy.
    """
    _share_openmp()
    for path in _libraries():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            failure = error
    raise RuntimeError(
        f"cannot load the compiled kernels: {failure}. Set XDG_CACHE_HOME to a folder from which "
        "programs may run, or remove the file"
    ) from failure


def _libraries() -> list[Path]:
    """Return the libraries to try in turn: the one of this compiler, which is made if missing; if
    that is not possible, those that other compilers made of the same sources.
    """
    key = _key()
    found = kept(f"host-{key}-*.so")
    try:
        command = compiler()
        path = cache_folder() / f"host-{key}-{_version(command)}.so"
    except RuntimeError as error:
        if found:
            return found[::-1]
        where = f"{cache_folder()} has no library of these sources for this processor either"
        raise RuntimeError(f"{error}; {where}") from None
    if path in found:
        return [path]
    if found and not os.access(cache_folder(), os.W_OK):
        return found[::-1]
    with _alone(path):
        if not is_ours(path):
            keep(path, functools.partial(_compile, command))
    return [path]


def compiler() -> list[str]:
    """Return the command of the C++ compiler that would be used, by words, as "ccache g++" has two.

    Raises: RuntimeError if there is none.
    """
    chosen = os.environ.get("CXX")
    for words in _words(chosen) if chosen else (["g++"], ["c++"], ["clang++"]):
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    missing = f"CXX is {chosen!r}, which is no command" if chosen else "no C++ compiler found"
    raise RuntimeError(f"{missing}: the native kernels need one. {REMEDY}")


def _words(command: str) -> Iterator[list[str]]:
    yield [command]  # a path may have spaces
    with contextlib.suppress(ValueError):  # a quotation without an end
        yield shlex.split(command)


def cache_folder() -> Path:
    """Return where compiled kernels are kept; it need not be there."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(os.path.expanduser(chosen)) / "parsimony" / "kernels"
    try:
        return Path.home() / ".cache" / "parsimony" / "kernels"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in some containers
        return _own_temporary_folder() / "kernels"


def kept(pattern: str) -> list[Path]:
    """Return the files of the cache that match and that may be loaded, the oldest first.

    Raises: RuntimeError if the cache is another user's.
    """
    folder = cache_folder()
    if not folder.exists():
        return []
    files = (path for path in private_folder(folder).glob(pattern) if is_ours(path))
    return sorted(files, key=lambda path: path.stat().st_mtime)


def _own_temporary_folder() -> Path:
    """Return this user's folder in /tmp, having checked that no other user made it."""
    folder = private_folder(Path(tempfile.gettempdir()) / f"parsimony-{os.getuid()}")
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"there is no HOME, and {folder} belongs to another user. Set HOME, or "
                           "XDG_CACHE_HOME to a folder that can be written")  # fmt: skip
    return folder


def keep(path: Path, make: Callable[[Path], None]) -> None:
    """Have `make` write a file of the cache so that others see it whole or not at all.

    Raises: RuntimeError with the remedy, if the cache cannot be written; what `make` raises.
    """
    try:
        private_folder(path.parent)
        # A folder of a fresh name: other hosts that share the cache may have the same process ids.
        with tempfile.TemporaryDirectory(
            prefix="new.", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            new = Path(folder) / path.name
            make(new)
            new.chmod(0o755)  # whatever the umask is: see trust.is_ours
            with open(new, "rb") as written:
                os.fsync(written.fileno())  # before the name, so that a crash leaves no half file
            new.replace(path)
    except OSError as error:
        raise RuntimeError(
            f"cannot keep the compiled kernels in {path.parent}: {error}. Set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one of a job's ranks, which start together, compile while the others wait for it.

    Where files cannot be locked, each compiles.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            private_folder(path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            lock = stack.enter_context(open(os.open(path.with_suffix(".lock"), flags, 0o600), "w"))
            deadline = time.monotonic() + PATIENCE
            while not _has_locked(lock.fileno()) and time.monotonic() < deadline:
                time.sleep(0.1)
        yield


def _has_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _compile(command: list[str], path: Path) -> None:
    sources = (str(PACKAGE / name) for name in SOURCES)
    words = [*command, *OPTIONS, f"-I{PACKAGE}", "-o", str(path), *sources]
    status, output = _run(words)
    if status or not path.exists():
        raise RuntimeError(f"{shlex.join(words)}\n{output[-2000:]}\n{REMEDY}")


def _run(words: list[str]) -> tuple[int, str]:
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:  # no program after all
        return 1, str(error)
    return result.returncode, result.stdout + result.stderr


def _key() -> str:
    sources = "".join(map(joined, SOURCES)).encode()
    return _digest(sources, " ".join(OPTIONS).encode(), _processor().encode())


def _version(command: list[str]) -> str:
    return _digest(_run([*command, "--version"])[1].encode(), repr(command[1:]).encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> str:
    """Name what -march=native stands for, as different machines may share a home and its cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    seen = dict(line.split(":", 1) for line in lines if line.startswith(wanted))
    return platform.machine() + repr(sorted(seen.items()))


def _share_openmp() -> None:
    """Let the library find the OpenMP that torch loaded, so that both use the same threads.

    With two OpenMPs there would be two teams of threads, and the idle team would spin on the cores
    on which the other one works.
    """
    maps = Path("/proc/self/maps")
    loaded = maps.read_text().split() if maps.exists() else []
    names = {
        path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))
    }
    from_torch = sorted(name for name in names if str(Path(torch.__file__).parent) in name)
    for name in from_torch or sorted(names):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
