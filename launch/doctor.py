"""What this machine has for training, what it lacks, and the remedy for each.

Standard library only, so that it runs where nothing is set up. Everything that may hang or crash
(MPI, CUDA, a broken extension module) is run by another process, with a time limit (probes.py).
Exit status: 0 if nothing required is missing, else 1.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.probes import (
    ASK_CUPY,
    ASK_HOROVOD,
    ASK_KERNELS,
    ASK_MPI4PY,
    ASK_TORCH,
    ASK_TORCHVISION,
    ask,
    environment_python,
    last_line,
    run,
)

SETUP = "launch/setup.sh"
AGAIN = "launch/setup.sh --again"
WITHOUT_HOROVOD = "parsimony-without-horovod"  # a file in the environment: see launch/setup.sh


class Check(NamedTuple):
    """One line of the table. A required thing that is missing or broken has a remedy."""

    name: str
    found: str
    remedy: str = ""
    required: bool = True

    @property
    def status(self) -> str:
        if self.required:
            return "missing" if self.remedy else "ok"
        return "optional" if self.remedy or self.found == "none" else "ok"


def check_python() -> Check:
    python = environment_python()
    _, version = run(python, "-c", "import platform; print(platform.python_version())")
    in_environment = python != sys.executable or sys.prefix != sys.base_prefix
    remedy = "" if in_environment else f"run {SETUP}: it makes the virtual environment"
    return Check("python", f"{version.strip()}, {python}", remedy)


def find_compiler() -> list[str]:
    """Return the words of the C++ compiler's command, found as in runtime/build.py; [] if none."""
    chosen = os.environ.get("CXX")
    for words in ([chosen], chosen.split()) if chosen else (["g++"], ["c++"], ["clang++"]):
        if words and shutil.which(words[0]):
            return words
    return []


def check_compiler() -> Check:
    """Check for a compiler of C++20, in which Horovod and our own kernels are written."""
    command = find_compiler()
    if not command and os.environ.get("CXX"):
        found = f"CXX is {os.environ['CXX']!r}, which is no command"
        return Check("compiler", found, "name one that is there, or unset CXX")
    if not command:
        return Check("compiler", "none", "install g++ (Debian: apt install g++)")
    flags = ("-std=c++20", "-x", "c++", "-fsyntax-only", "-")
    status, _ = run(*command, *flags, input="#include <concepts>\nstd::integral auto x = 1;\n")
    _, banner = run(*command, "--version")
    found = banner.splitlines()[0] if banner else " ".join(command)
    if status == 0:
        return Check("compiler", f"{found}, C++20")
    remedy = "install g++ 10 or clang 12, or newer, and name it with CXX"
    return Check("compiler", f"{found}, no C++20", remedy)


def is_compiled() -> bool:
    """Tell whether Horovod and the kernels are compiled, as on a node that shares a home folder."""
    plain = os.environ.get("PARSIMONY_KERNELS") == "reference"
    kernels = {} if plain else ask(ASK_KERNELS, seconds=300)
    has_engine = is_without_horovod() or "error" not in ask(ASK_HOROVOD)
    return "error" not in kernels and has_engine


def check_headers() -> Check:
    """Check for Python.h, which Linux distributions keep in a package of its own."""
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    header = Path(run(environment_python(), "-c", code)[1].strip()) / "Python.h"
    if header.exists():
        return Check("Python.h", str(header))
    return Check("Python.h", "none", "install Python's headers (Debian: apt install python3-dev)")


def check_torch(facts: dict, driver: bool) -> Check:
    if "error" in facts:
        return Check("torch", facts["error"], f"run {SETUP}")
    if facts["cuda"]:
        return Check("torch", f"{facts['version']}, CUDA {facts['cuda']}")
    remedy = ""
    if driver:
        remedy = f"for the GPU: remove .venv and run {SETUP} (see PARSIMONY_TORCH_INDEX in its -h)"
    return Check("torch", f"{facts['version']}, no CUDA", remedy, required=False)


def check_torchvision(facts: dict) -> Check:
    """Check a plain import; launch/setup.sh makes it work even if the wheel does not fit torch."""
    if "error" in facts:
        return Check("torchvision", facts["error"], f"run {AGAIN}")
    return Check("torchvision", facts["version"])


def check_torchrun(facts: dict) -> Check:
    """Check what TorchComm needs: torchrun to start ranks, gloo to send their messages."""
    torchrun = Path(environment_python()).with_name("torchrun")
    if not facts["gloo"]:
        return Check("torchrun", "this torch has no gloo", f"run {AGAIN}")
    if not torchrun.exists():
        return Check("torchrun", "none", f"run {AGAIN}")
    return Check("torchrun", f"{torchrun}, gloo")


def is_without_horovod() -> bool:
    wanted = os.environ.get("PARSIMONY_WITHOUT_HOROVOD", "")
    return wanted == "1" or (
        wanted != "0" and (Path(environment_python()).parents[1] / WITHOUT_HOROVOD).exists()
    )


def check_horovod(facts: dict, torch_version: str) -> Check:
    if "error" in facts:
        return Check("horovod", facts["error"], f"run {AGAIN}")
    parts = [name for name in ("MPI", "Gloo", "NCCL") if facts[name.lower()]]
    found = f"{facts['version']} with {', '.join(parts)}, built against torch {facts['torch']}"
    if facts["torch"] != torch_version:
        return Check("horovod", found, f"torch is {torch_version or 'missing'}: run {AGAIN}")
    if not (facts["mpi"] and facts["gloo"]):
        return Check("horovod", found, "remove ~/.cache/parsimony/wheels and run " + AGAIN)
    return Check("horovod", found)


def parse_mpirun_version(banner: str) -> str:
    """Return '4.1.8' for "mpirun (Open MPI) 4.1.8"; "" for another MPI."""
    match = re.search(r"\(Open MPI\) (\S+)", banner)
    return match[1] if match else ""


def check_mpirun(path: str, banner: str) -> Check:
    version = parse_mpirun_version(banner)
    if not path:
        return Check("mpirun", "none", f"run {SETUP}: it installs Open MPI 4.1")
    if not version.startswith("4."):
        found = f"{path}: {version or (banner.splitlines() or ['no answer'])[0]}"
        return Check("mpirun", found, f"Open MPI 4.1 is needed; run {AGAIN}")
    return Check("mpirun", f"Open MPI {version}, {path}")


def check_start(mpirun: str) -> Check:
    """Start two processes on this machine, which a container or a firewall can forbid."""
    options = ("--allow-run-as-root", "-np", "2", "-H", "localhost:2", "-bind-to", "none")
    status, output = run(mpirun, *options, "true", seconds=30)
    if status == 0:
        return Check("MPI job", "two processes start here")
    return Check(
        "MPI job", last_line(output)[:160], f"does this machine resolve its own name? {AGAIN}"
    )


def check_same_mpi(name: str, facts: dict, mpirun: str) -> Check:
    """Check that a library uses the MPI of mpirun; with another one, each rank would run alone."""
    if "error" in facts:
        return Check(name, facts["error"], f"run {AGAIN}")
    ours = str(Path(mpirun).parent.parent.resolve())
    strangers = [path for path in facts["libmpi"] if not path.startswith(ours + "/")]
    found = f"{facts['version']}, {', '.join(facts['libmpi']) or 'no libmpi loaded'}"
    if strangers or not facts["libmpi"]:
        return Check(name, found, f"not the MPI of {mpirun}: unset LD_LIBRARY_PATH, run {AGAIN}")
    return Check(name, found)


def check_kernels(facts: dict) -> Check:
    if os.environ.get("PARSIMONY_KERNELS") == "reference":
        return Check("CPU kernels", "plain torch (PARSIMONY_KERNELS=reference)")
    if "error" in facts:
        remedy = "see compiler; or export PARSIMONY_KERNELS=reference, which is slow"
        return Check("CPU kernels", facts["error"], remedy)
    return Check("CPU kernels", facts["library"])


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin") or ""


def check_gpu(driver: bool, torch: dict, horovod: dict) -> Iterator[Check]:
    """Check what matters only on a machine with a GPU; without one, nothing of it is missing."""
    names = torch.get("gpus", [])
    trouble = "torch sees none: nvidia-smi, CUDA_VISIBLE_DEVICES" if driver and not names else ""
    yield Check("GPU", ", ".join(names) or "none", trouble, required=False)

    nvcc = find_nvcc()
    _, banner = run(nvcc, "--version") if nvcc else (0, "")
    release = re.search(r"release ([\d.]+)", banner)
    remedy = "install CUDA's toolkit, set CUDA_HOME" if driver and not nvcc else ""
    yield Check("nvcc", f"{release[1]}, {nvcc}" if release else "none", remedy, required=False)

    nccl = "in Horovod" if horovod.get("nccl") else "none"
    remedy = f"needs nvcc and a CUDA build of torch; then {AGAIN}" if nccl == "none" else ""
    yield Check("NCCL", nccl, remedy if driver else "", required=False)

    cupy = ask(ASK_CUPY)
    remedy = f"run {AGAIN}" if driver and "error" in cupy else ""
    found = cupy.get("version") or ("none" if not driver else cupy["error"])
    yield Check("CuPy", found, remedy, required=False)


def all_checks() -> Iterator[Check]:
    driver = any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")))
    yield check_python()
    to_compile = [check_compiler(), check_headers()]
    required = not any(check.remedy for check in to_compile) or not is_compiled()
    yield from (check._replace(required=required) for check in to_compile)
    torch, horovod = ask(ASK_TORCH), ask(ASK_HOROVOD)
    yield check_torch(torch, driver)
    if "error" not in torch:
        yield check_torchvision(ask(ASK_TORCHVISION))
        yield check_torchrun(torch)
    if "error" in horovod and is_without_horovod():
        yield Check("horovod", "none", "left out: jobs start with torchrun", required=False)
    else:
        yield from check_horovod_and_mpi(horovod, torch)
    if "error" not in torch:
        yield check_kernels(ask(ASK_KERNELS, seconds=300))
    yield from check_gpu(driver, torch, horovod)


def check_horovod_and_mpi(horovod: dict, torch: dict) -> Iterator[Check]:
    beside_python = str(Path(environment_python()).parent)
    mpirun = shutil.which("mpirun", path=f"{beside_python}:{os.environ.get('PATH', '')}") or ""
    yield check_horovod(horovod, torch.get("version", ""))
    yield check_mpirun(mpirun, run(mpirun, "--version")[1] if mpirun else "")
    if mpirun:
        yield check_start(mpirun)
    if mpirun and "error" not in horovod:
        yield check_same_mpi("MPI of horovod", horovod, mpirun)
    yield check_same_mpi("mpi4py", ask(ASK_MPI4PY), mpirun or "/")


def main() -> int:
    checks = []
    for check in all_checks():
        checks.append(check)
        print(f"{check.name:<15} {check.status:<9} {check.found}", flush=True)
        if check.remedy:
            print(f"{'':<15} {'':<9} -> {check.remedy}", flush=True)
    missing = [check.name for check in checks if check.status == "missing"]
    print(f"missing: {', '.join(missing)}" if missing else "nothing required is missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
