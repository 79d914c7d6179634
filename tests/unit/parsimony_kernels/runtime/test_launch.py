"""What is known of CuPy's part without CuPy: a stand-in that compiles nothing."""

import sys
from types import SimpleNamespace

import pytest

from parsimony_kernels.runtime import launch as launch_cupy


class CompileException(Exception):
    pass


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """A stand-in for CuPy, and an empty cache."""
    compiler = SimpleNamespace(CompileException=CompileException, calls=[])

    def compile_using_nvrtc(source, options):
        compiler.calls.append(options)
        return b"code", None

    compiler.compile_using_nvrtc = compile_using_nvrtc
    nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
    cupy = SimpleNamespace(cuda=SimpleNamespace(compiler=compiler, nvrtc=nvrtc))
    monkeypatch.setattr(launch_cupy, "_cupy", lambda: cupy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cupy


def test_a_gpu_is_compiled_for_once(cupy):
    first, again = launch_cupy._compiled("9.0"), launch_cupy._compiled("9.0")
    assert first == again and first.read_bytes() == b"code"
    assert launch_cupy._compiled("7.0") != first
    assert cupy.cuda.compiler.calls == [launch_cupy.OPTIONS] * 2


def test_without_nvrtc_what_another_node_compiled_is_taken(cupy):
    def get_version():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    kept = launch_cupy._compiled("9.0")
    cupy.cuda.nvrtc.getVersion = get_version
    assert launch_cupy._compiled("9.0") == kept
    with pytest.raises(RuntimeError, match=r"NVRTC.*libnvrtc.*PARSIMONY_KERNELS=reference"):
        launch_cupy._compiled("7.0")


def test_the_source_stands_alone(cupy):
    assert "#include" not in launch_cupy.source()
    for name in ("FN u32 hash_row", "KERNEL(cover_store,", "KERNEL(accumulate,"):
        assert launch_cupy.source().count(name) == 1


def test_an_error_of_the_compiler_is_shown_with_a_remedy(cupy):
    def fail(source, options):
        raise CompileException("line 7: no such name")

    cupy.cuda.compiler.compile_using_nvrtc = fail
    with pytest.raises(RuntimeError, match="9.0: line 7(.|\n)*PARSIMONY_KERNELS=reference"):
        launch_cupy._compiled("9.0")


def test_a_cache_that_cannot_be_written_is_named(cupy, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with pytest.raises(RuntimeError, match="XDG_CACHE_HOME"):
        launch_cupy._compiled("9.0")


def test_without_cupy_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    launch_cupy._cupy.cache_clear()
    with pytest.raises(RuntimeError, match="launch/setup.sh .* PARSIMONY_KERNELS=reference"):
        launch_cupy._cupy()
