"""Stage 4h: what 4t proves, under `horovodrun --gloo`, with Horovod built here from its source.

Horovod is built for Gloo and the CPU: ranks that share a GPU cannot use NCCL, and their tensors
travel through the host's memory. The source is in the folder of wheels: gpu_proof.sh --collect
lays it there. Leaves horovod-build.log. A rehearsal takes the Horovod that is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.common import SKIPPED, Proof, begin

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 300  # that the build may take
KEPT = 4000  # characters of its log, with the figures
# torch and nvcc are those of a GPU, but Horovod's part for CUDA, which does not know today's cards,
# stays out.
CMAKE = """#!/bin/sh
export PYTHONPATH={hidden}:$PYTHONPATH
exec {wrapper} "$@" -DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON
"""
HIDE_CUDA = "import torch.version\n\ntorch.version.cuda = None\n"


def main() -> None:
    proof = begin("4h", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        if not proof.is_rehearsal:
            install(proof, Path(folder))
        elif importlib.util.find_spec("horovod") is None:
            skip("Horovod is not installed")
        from benchmarks.gpu.ranks import prove  # looks for Horovod when it is imported

        prove(proof, "horovodrun --gloo")


def skip(why: str) -> None:
    print(f"skipped: {why}")
    sys.exit(SKIPPED)


def install(proof: Proof, folder: Path) -> None:
    """Build Horovod into `folder`, for this process and its own; exit with 1 if that fails."""
    wheels = Path(os.environ.get("PARSIMONY_WHEELS", ROOT / ".whl"))
    source = next(iter(sorted(wheels.glob("horovod-*.tar.gz"))), None)
    if source is None:
        skip(f"Horovod's source is not in {wheels} (gpu_proof.sh --collect lays it there)")
    start = time.monotonic()
    log = proof.out / "horovod-build.log"
    problem = build(source, folder, log)
    text = f"{source.name}, Gloo and CPU, {time.monotonic() - start:.0f} s"
    if problem:
        tail = log.read_text(errors="replace")[-KEPT:]
        print(tail, flush=True)
        proof.add("Horovod built", f"{text}: {problem}", ("Horovod builds", False), log=tail)
        sys.exit(1)
    proof.add("Horovod built", text, ("Horovod builds", True))
    sys.path.insert(0, str(folder))
    prepend("PYTHONPATH", folder)
    prepend("PATH", folder / "bin")


def prepend(name: str, path: Path | str) -> None:
    os.environ[name] = os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])


def build(source: Path, folder: Path, log: Path) -> str:
    """Install Horovod's source in `folder`, without a network; return what failed, or ""."""
    words = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps",
             "--no-build-isolation", "--no-cache-dir", "--target", str(folder),
             str(source)]  # fmt: skip
    with tempfile.TemporaryDirectory() as place, log.open("w") as file:
        try:
            status = subprocess.run(
                words, env=settings(Path(place)), stdout=file, stderr=subprocess.STDOUT,
                timeout=MOST_SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:  # what pip has started ends with the stage
            return f"not done after {MOST_SECONDS} s"
    return f"failed with status {status}" if status else ""


def settings(place: Path) -> dict[str, str]:
    """Return the environment of the build; place: a folder for what it needs."""
    hidden, cmake = place / "hidden", place / "cmake"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE_CUDA)
    paths = {"hidden": hidden, "wrapper": ROOT / "launch/horovod_build/cmake"}
    cmake.write_text(CMAKE.format_map({n: shlex.quote(str(path)) for n, path in paths.items()}))
    cmake.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOROVOD_CMAKE": str(cmake),
        "HOROVOD_WITH_PYTORCH": "1", "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Horovod's files are too old for CMake 4 otherwise
        "CPLUS_INCLUDE_PATH": sysconfig.get_path("include"),  # Horovod asks distutils, now gone
    }  # fmt: skip


if __name__ == "__main__":
    main()
