"""The CUDA sources compile for every architecture: by nvcc, and by NVRTC as CuPy compiles it."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from parsimony_kernels.runtime import launch as launch_cupy
from tests.long import all_but_long, long

KERNELS = Path(launch_cupy.__file__).parents[1]
ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Without optimisation, which is most of the time and refuses nothing.
QUICKLY = ("-Xcicc", "-O0", "-Xptxas", "-O0")


def nvcc(*words):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc on PATH")
    return subprocess.run([compiler, *words], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("every", [False, long(True)])
def test_nvcc_compiles_for_the_architectures_that_it_knows(tmp_path, every):
    known = nvcc("--list-gpu-code").stdout.split()
    targets = [name for name in ARCHITECTURES if name in known]
    targets = targets if every else [targets[0], targets[-1]]
    words = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in targets]
    words += [*launch_cupy.OPTIONS, *QUICKLY, "-Werror=all-warnings"]
    output = tmp_path / "device.fatbin"
    words += [f"-I{KERNELS}", str(KERNELS / launch_cupy.ENTRY), "-o", str(output)]
    result = nvcc("-fatbin", *words)
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size > 0


class Nvrtc:
    """NVIDIA's run-time compiler, from the wheel nvidia-cuda-nvrtc; needs no GPU."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia")
        places = spec.submodule_search_locations if spec else []
        paths = [path for place in places for path in Path(place).rglob("libnvrtc.so.*")]
        if not paths:
            pytest.skip("no nvidia-cuda-nvrtc wheel")
        self.library = ctypes.CDLL(str(paths[0]))

    def architectures(self) -> list[str]:
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(numbers)
        return [f"sm_{number}" for number in numbers]

    def compile(self, source: str, *options: str) -> tuple[bool, str]:
        """Return whether it compiled, and the log."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        create = self.library.nvrtcCreateProgram
        assert create(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
        status = self.library.nvrtcCompileProgram(program, len(options), words)
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return status == 0, log.value.decode()


@pytest.mark.parametrize("architecture", all_but_long(["sm_70"], ARCHITECTURES))
def test_nvrtc_compiles_as_cupy_does(architecture):
    nvrtc = Nvrtc()
    if architecture not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know {architecture}")
    options = (f"-arch={architecture}", *launch_cupy.OPTIONS)
    compiled, log = nvrtc.compile(launch_cupy.source(), *options)
    assert compiled, log
