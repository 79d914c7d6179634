"""What this machine has for training, what it lacks, and the remedy for each.

Standard library only, so that it runs where nothing is set up. Everything that may hang or crash
(MPI, CUDA, a broken extension module) is asked of another process, with a time limit.
Exit status: 0 if nothing required is missing, else 1.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
SETUP = "launch/setup.sh"
AGAIN = "launch/setup.sh --again"
WITHOUT_HOROVOD = "parsimony-without-horovod"  # in the environment's folder: see launch/setup.sh


class Check(NamedTuple):
    """One line of the table. What is required and not good has a remedy."""

    name: str
    found: str
    remedy: str = ""
    required: bool = True

    @property
    def status(self) -> str:
        if self.required:
            return "missing" if self.remedy else "ok"
        return "optional" if self.remedy or self.found == "none" else "ok"


def environment_python() -> str:
    """The Python that training uses, or this one where nothing is set up yet."""
    venv = os.path.expanduser(os.environ.get("PARSIMONY_VENV") or REPO / ".venv")
    python = Path(venv) / "bin" / "python"
    return str(python) if python.exists() else sys.executable


def run(*command: str, seconds: int = 60, **options) -> tuple[int, str]:
    """Exit status and output of a command; a missing or a hanging one is a failure like others."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, **options
        )
    except OSError as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {seconds} s"
    return done.returncode, done.stdout + done.stderr


def last_line(output: str) -> str:
    """The last line that says something: Open MPI likes to end on a rule."""
    lines = [line for line in output.splitlines() if any(map(str.isalnum, line))]
    return lines[-1].strip() if lines else "no answer"


def ask(code: str, seconds: int = 60) -> dict:
    """Facts that `code` prints as a last line of JSON, or as "error" the last line it died with."""
    status, output = run(environment_python(), "-c", code, seconds=seconds)
    return json.loads(last_line(output)) if status == 0 else {"error": last_line(output)[:160]}


# Which MPI a process has loaded is read from its memory map: the one thing that cannot be wrong.
_LOADED_MPI = """
def loaded_mpi():
    import os
    try:
        lines = open("/proc/self/maps").read().splitlines()
    except OSError:
        return []
    return sorted({os.path.realpath(line.split()[-1]) for line in lines if "/libmpi.so" in line})
"""

_ASK_TORCH = """
import json, torch
from torch import distributed
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus,
    "gloo": distributed.is_available() and distributed.is_gloo_available()}))
"""

_ASK_TORCHVISION = """
import json, torchvision
print(json.dumps({"version": torchvision.__version__}))
"""

_ASK_HOROVOD = (
    _LOADED_MPI
    + """
import json, pathlib, horovod, horovod.torch as hvd
built = json.loads((pathlib.Path(horovod.__file__).parent / "metadata.json").read_text())
print(json.dumps({"version": horovod.__version__, "torch": built.get("pytorch"),
    "mpi": bool(hvd.mpi_built()), "gloo": bool(hvd.gloo_built()), "nccl": bool(hvd.nccl_built()),
    "libmpi": loaded_mpi()}))
"""
)

_ASK_MPI4PY = (
    _LOADED_MPI
    + """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps({"version": mpi4py.__version__, "libmpi": loaded_mpi()}))
"""
)

# Compiles them, if this machine has not: better now than in a first run.
_ASK_KERNELS = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from parsimony_kernels.runtime import build
import json
try:
    print(json.dumps({{"library": build.host_library()._name}}))
except RuntimeError as error:
    print(json.dumps({{"error": " ".join(str(error).split())[:160]}}))
"""

_ASK_CUPY = """
import json, cupy
print(json.dumps({"version": cupy.__version__, "devices": cupy.cuda.runtime.getDeviceCount()}))
"""


def check_python() -> Check:
    python = environment_python()
    _, version = run(python, "-c", "import platform; print(platform.python_version())")
    in_environment = python != sys.executable or sys.prefix != sys.base_prefix
    remedy = "" if in_environment else f"run {SETUP}: it makes the virtual environment"
    return Check("python", f"{version.strip()}, {python}", remedy)


def find_compiler() -> list[str]:
    """The words of the C++ compiler's command, as runtime/build.py finds it; empty if none."""
    chosen = os.environ.get("CXX")
    for words in ([chosen], chosen.split()) if chosen else (["g++"], ["c++"], ["clang++"]):
        if words and shutil.which(words[0]):
            return words
    return []


def check_compiler() -> Check:
    """Horovod and our own kernels are C++20."""
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
    """Whether Horovod and the kernels are there, as on a node that shares another's home."""
    plain = os.environ.get("PARSIMONY_KERNELS") == "reference"
    kernels = {} if plain else ask(_ASK_KERNELS, seconds=300)
    has_engine = is_without_horovod() or "error" not in ask(_ASK_HOROVOD)
    return "error" not in kernels and has_engine


def check_headers() -> Check:
    """Python.h, which a Python from a distribution keeps in a package of its own."""
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
    """A plain import, which set-up makes work beside a torch that the wheel does not fit."""
    if "error" in facts:
        return Check("torchvision", facts["error"], f"run {AGAIN}")
    return Check("torchvision", facts["version"])


def check_torchrun(facts: dict) -> Check:
    """What TorchComm needs: to start ranks, and to carry their messages."""
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
    """'4.1.8' of "mpirun (Open MPI) 4.1.8"; empty for another MPI."""
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
    """Two processes on this machine: what a container or a firewall can forbid."""
    options = ("--allow-run-as-root", "-np", "2", "-H", "localhost:2", "-bind-to", "none")
    status, output = run(mpirun, *options, "true", seconds=30)
    if status == 0:
        return Check("MPI job", "two processes start here")
    return Check(
        "MPI job", last_line(output)[:160], f"does this machine resolve its own name? {AGAIN}"
    )


def check_same_mpi(name: str, facts: dict, mpirun: str) -> Check:
    """Whether a library uses the MPI that mpirun belongs to; another one runs, each rank alone."""
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
    """What matters only beside a GPU; without one there is nothing to do about it."""
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

    cupy = ask(_ASK_CUPY)
    remedy = f"run {AGAIN}" if driver and "error" in cupy else ""
    found = cupy.get("version") or ("none" if not driver else cupy["error"])
    yield Check("CuPy", found, remedy, required=False)


def all_checks() -> Iterator[Check]:
    driver = any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")))
    yield check_python()
    to_compile = [check_compiler(), check_headers()]
    required = not any(check.remedy for check in to_compile) or not is_compiled()
    yield from (check._replace(required=required) for check in to_compile)
    torch, horovod = ask(_ASK_TORCH), ask(_ASK_HOROVOD)
    yield check_torch(torch, driver)
    if "error" not in torch:
        yield check_torchvision(ask(_ASK_TORCHVISION))
        yield check_torchrun(torch)
    if "error" in horovod and is_without_horovod():
        yield Check("horovod", "none", "left out: jobs start with torchrun", required=False)
    else:
        yield from check_horovod_and_mpi(horovod, torch)
    if "error" not in torch:
        yield check_kernels(ask(_ASK_KERNELS, seconds=300))
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
    yield check_same_mpi("mpi4py", ask(_ASK_MPI4PY), mpirun or "/")


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
