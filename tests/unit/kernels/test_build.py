"""How the C++ gets compiled: once, whole or not at all, and never replaced in silence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build, host, ops
from kernels.operands import Rule

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Forget the loaded library, and keep compiled ones in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for loaded in (build.host_library, host._library):
        loaded.cache_clear()
    yield tmp_path / "parsimony" / "kernels"
    for loaded in (build.host_library, host._library):
        loaded.cache_clear()


def a_step():
    ops.step(torch.zeros(2, 2), torch.zeros(2, 2), Rule(lr=0.1))


def test_no_compiler_is_an_error_with_the_remedy_not_a_fallback(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler.*CXX.*PARSIMONY_KERNELS=reference"):
        a_step()
    with ops.use("reference"):
        a_step()


def test_a_compiler_that_is_named_and_missing_is_not_replaced(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="CXX is 'no-such-compiler', which is no command"):
        a_step()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="PARSIMONY_KERNELS=reference"):
        a_step()


def test_too_little_memory_is_an_error_that_python_sees():
    code = (
        "import resource, torch\n"
        "from kernels import operands, ops\n"
        "p, g = torch.zeros(64, 400_000), torch.zeros(64, 400_000)\n"
        "second = operands.Factored(torch.zeros(64), torch.zeros(400_000))\n"
        "ops.step(p[:1, :9].contiguous(), g[:1, :9].contiguous(), ops.Rule(lr=0.1))\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n"
        "    ops.step(p, g, ops.Rule(lr=0.1), second=second)\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "not enough memory for a step" in result.stdout, result.stderr


def test_what_the_compiler_says_is_passed_on(fresh, monkeypatch):
    monkeypatch.setattr(build, "OPTIONS", (*build.OPTIONS, "-no-such-option"))
    with pytest.raises(RuntimeError, match=r"no-such-option[\s\S]*PARSIMONY_KERNELS=reference"):
        a_step()
    assert not list(fresh.glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(fresh):
    fresh.parent.write_text("a file where the folder should be")
    with pytest.raises(RuntimeError, match=r"cannot keep .*XDG_CACHE_HOME"):
        a_step()


def test_a_change_in_any_source_makes_another_library(tmp_path, monkeypatch):
    sources = (*build.HEADERS, *build.SOURCES)
    for name in sources:
        shutil.copy(build.HERE / name, tmp_path / name)
    monkeypatch.setattr(build, "HERE", tmp_path)
    keys = {build._key()}
    for name in sources:
        with open(tmp_path / name, "a") as source:
            source.write("// changed")
        keys.add(build._key())
    assert len(keys) == 1 + len(sources)


def test_ranks_that_start_together_compile_once(fresh):
    code = (
        "from kernels import build\n"
        "compile = build._compile\n"
        "build.subprocess.run = lambda *a, run=build.subprocess.run, **k: "
        "(print('compiles') if '-shared' in a[0] else None) or run(*a, **k)\n"
        "build.host_library()\n"
    )
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert b"".join(outputs).count(b"compiles") == 1
    assert len(list(fresh.glob("*.so"))) == 1
    assert not list(fresh.glob("*.new.*"))


def test_torch_and_the_kernels_share_their_threads():
    """A second OpenMP would keep a team of threads of its own, spinning beside torch's."""
    code = (
        "import torch\n"
        "from kernels import operands, ops\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(10**6).add_(1).sum()\n"
        "count = lambda: len(__import__('os').listdir('/proc/self/task'))\n"
        "before = count()\n"
        "p, g = torch.zeros(1000, 1000), torch.ones(1000, 1000)\n"
        "ops.step(p, g, ops.Rule(lr=0.1), second=operands.Full(torch.zeros(1000, 1000)))\n"
        "assert count() == before, (before, count())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)
