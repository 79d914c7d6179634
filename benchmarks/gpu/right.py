"""Stage 1: tests/gpu against the specification; one case of each kernel under compute-sanitizer.

All at once: the sanitizer's processes take little of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.common import Proof, begin

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 150  # that a tool of the sanitizer may take
TOOLS = ("memcheck", "racecheck", "synccheck")
REHEARSED = "tests/unit/parsimony_kernels/step/test_device.py"


def main() -> None:
    proof = begin("1", __doc__)
    compile_kernels(proof)
    with tempfile.TemporaryDirectory() as folder:
        watched = watch(proof, Path(folder))
        is_right = run_tests(proof)
        for tool, process, start, log in watched:
            seconds = time.monotonic() - start
            try:
                status = process.wait(max(1, MOST_SECONDS - seconds))
                ended = "nothing found" if status == 0 else f"status {status}"
            except subprocess.TimeoutExpired:
                process.kill()
                status, ended = 1, "stopped before its end"
            print(log.read_text()[-4000:])
            seconds = time.monotonic() - start
            proof.add(tool, f"{ended}, within {seconds:.0f} s", (f"{tool} clean", status == 0))
            is_right &= status == 0
    sys.exit(not is_right)


def compile_kernels(proof: Proof) -> None:
    """Compile the CUDA source as it is on a GPU: by NVRTC through CuPy, or, without a GPU, nvcc."""
    from parsimony_kernels.runtime import launch

    start = time.monotonic()
    if not proof.is_rehearsal:
        import torch

        torch.cuda.init()
        launch._module(0)
        how = "NVRTC, through CuPy"
    else:
        how = compile_without_gpu(launch)
    proof.add("kernels compiled", f"{how}, {time.monotonic() - start:.1f} s")


def compile_without_gpu(launch) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "not compiled: no nvcc here"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.cu"
        source.write_text(launch.source())
        words = [nvcc, "-arch=sm_90", "-cubin", "-o", os.devnull, str(source), *launch.OPTIONS]
        subprocess.run(words, check=True)
    return "nvcc for sm_90"


def watch(proof: Proof, folder: Path) -> list[tuple[str, subprocess.Popen, float, Path]]:
    """Start one case of each kernel under each of the sanitizer's tools."""
    found = []
    sanitizer = shutil.which("compute-sanitizer")
    if not proof.is_rehearsal and sanitizer is None:
        proof.add("compute-sanitizer", "not on PATH: not run")
        return found
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    python = [sys.executable, "-m", "tests.gpu.few_cases"]
    for tool in TOOLS[:1] if proof.is_rehearsal else TOOLS:
        words = [*python, "--emulated"] if proof.is_rehearsal else [
            sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", *python
        ]  # fmt: skip
        log = folder / tool
        with log.open("w") as file:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        found.append((tool, process, time.monotonic(), log))
    return found


def run_tests(proof: Proof) -> bool:
    words = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir=.", "-q", "-rf",
             "--import-mode=importlib", "-p", "no:cacheprovider", "--durations=5"]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        words += ["-n", "1" if proof.is_rehearsal else "12"]
    which = [REHEARSED, "-k", "one_pass"] if proof.is_rehearsal else [
        "tests/gpu", "--deselect", "tests/gpu/test_kernels.py::test_compute_sanitizer_finds_nothing"
    ]  # fmt: skip
    done = subprocess.run(
        [*words, *which], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "REQUIRE_GPU": "" if proof.is_rehearsal else "1",
             "OMP_NUM_THREADS": "1"},  # a dozen processes would otherwise take all cores each
    )  # fmt: skip
    print(done.stdout[-12000:])
    last = (re.findall(r"^.*\d+ (?:passed|failed|error|skipped).*$", done.stdout, re.M) or ["?"])[
        -1
    ]
    is_right = done.returncode == 0
    proof.add("tests/gpu", last.strip("= "), ("all tests pass", is_right))
    return is_right


if __name__ == "__main__":
    main()
