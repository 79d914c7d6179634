"""Ask another process about its environment: how doctor.py asks, and the programs that it runs.

The other process has a time limit and may crash. Standard library only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def environment_python() -> str:
    """Return the Python that training uses, or this one if nothing is set up yet."""
    venv = os.path.expanduser(os.environ.get("PARSIMONY_VENV") or REPO / ".venv")
    python = Path(venv) / "bin" / "python"
    return str(python) if python.exists() else sys.executable


def run(*command: str, seconds: int = 60, **options) -> tuple[int, str]:
    """Return a command's exit status and output; one that is missing or hangs fails like others."""
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
    """Return the last line with a letter or digit: Open MPI ends its messages with a ruled line."""
    lines = [line for line in output.splitlines() if any(map(str.isalnum, line))]
    return lines[-1].strip() if lines else "no answer"


def ask(code: str, seconds: int = 60) -> dict:
    """Run `code` in the environment's Python; return the facts that its last line has as JSON.

    If it fails, they are {"error": the last line of its output}.
    """
    status, output = run(environment_python(), "-c", code, seconds=seconds)
    return json.loads(last_line(output)) if status == 0 else {"error": last_line(output)[:160]}


# Which MPI a process has loaded is read from its memory map, which is always right.
_LOADED_MPI = """
def loaded_mpi():
    import os
    try:
        lines = open("/proc/self/maps").read().splitlines()
    except OSError:
        return []
    return sorted({os.path.realpath(line.split()[-1]) for line in lines if "/libmpi.so" in line})
"""

ASK_TORCH = """
import json, torch
from torch import distributed
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus,
    "gloo": distributed.is_available() and distributed.is_gloo_available()}))
"""

ASK_TORCHVISION = """
import json, torchvision
print(json.dumps({"version": torchvision.__version__}))
"""

ASK_HOROVOD = (
    _LOADED_MPI
    + """
import json, pathlib, horovod, horovod.torch as hvd
built = json.loads((pathlib.Path(horovod.__file__).parent / "metadata.json").read_text())
print(json.dumps({"version": horovod.__version__, "torch": built.get("pytorch"),
    "mpi": bool(hvd.mpi_built()), "gloo": bool(hvd.gloo_built()), "nccl": bool(hvd.nccl_built()),
    "libmpi": loaded_mpi()}))
"""
)

ASK_MPI4PY = (
    _LOADED_MPI
    + """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps({"version": mpi4py.__version__, "libmpi": loaded_mpi()}))
"""
)

# Compiles the kernels, if this machine has not yet: better now than in the first run.
ASK_KERNELS = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from parsimony_kernels.runtime import build
import json
try:
    print(json.dumps({{"library": build.host_library()._name}}))
except RuntimeError as error:
    print(json.dumps({{"error": " ".join(str(error).split())[:160]}}))
"""

ASK_CUPY = """
import json, cupy
print(json.dumps({"version": cupy.__version__, "devices": cupy.cuda.runtime.getDeviceCount()}))
"""
