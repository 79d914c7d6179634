"""How the C++ gets compiled: once, whole or not at all, and never replaced in silence."""

import errno
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from parsimony_kernels.runtime import build, sources
from parsimony_kernels.runtime.operands import Rule
from parsimony_kernels.step import ops

ROOT = Path(__file__).parents[4]
DEVICES = ("device", "grid")  # headers of the CUDA sources alone


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Forget the loaded library, and keep compiled ones in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.host_library.cache_clear()
    yield tmp_path / "parsimony" / "kernels"
    build.host_library.cache_clear()


def a_step():
    ops.step(torch.zeros(2, 2), torch.zeros(2, 2), Rule(lr=0.1))


@pytest.fixture(scope="session")
def compiled():
    """The library that this machine has, so that no test here waits for a compiler."""
    return Path(build.host_library()._name)


@pytest.fixture
def copying(tmp_path, compiled, monkeypatch):
    """CXX is a script that notes its arguments in `calls`, and copies `compiled` for a result."""
    script, calls = tmp_path / "c o m p i l e", tmp_path / "calls"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo copying 1.0; exit;; esac\n'
        f"echo $* >>{calls}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'head -c 1000 {compiled} >"$2"; sleep ${{DELAY:-0}}; cp {compiled} "$2"\n'
    )
    script.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("CXX", str(script))
    return calls


LOAD = "from parsimony_kernels.runtime import build; build.host_library(); print('loaded')"


def start(code=LOAD, **environment):
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    env = os.environ | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def assert_loaded(*processes):
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert out == "loaded\n", err


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
        "from parsimony_kernels.runtime import operands\n"
        "from parsimony_kernels.step import ops\n"
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
    package = tmp_path / "package"
    shutil.copytree(sources.PACKAGE, package)
    monkeypatch.setattr(sources, "PACKAGE", package)
    keys = {build._key()}
    files = [package / name for name in build.SOURCES]
    headers = [path for path in package.rglob("*.h") if not path.name.startswith(DEVICES)]
    for path in (*files, *headers):
        with open(path, "a") as source:
            source.write("// changed")
        keys.add(build._key())
    assert len(keys) == 1 + len(files) + len(headers)


def test_another_compiler_or_another_option_of_it_makes_another_library(copying):
    commands = [build.compiler(), [*build.compiler(), "-m64"], ["g++"]]
    assert len({build._version(command) for command in commands}) == 3


def test_ranks_that_start_together_compile_once(fresh, copying):
    assert_loaded(*(start(DELAY="1") for _ in range(2)))
    assert len(copying.read_text().splitlines()) == 1
    assert [path.suffix for path in sorted(fresh.iterdir())] == [".lock", ".so"]


def test_where_files_cannot_be_locked_each_compiles(fresh, copying, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    a_step()
    assert len(list(fresh.glob("*.so"))) == 1


def test_who_holds_the_lock_for_ever_is_not_waited_for(fresh, copying, monkeypatch):
    monkeypatch.setattr(build, "PATIENCE", 0.3)
    fresh.mkdir(parents=True)
    path = fresh / f"host-{build._key()}-{build._version(build.compiler())}"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        a_step()


def test_a_compilation_that_was_killed_leaves_nothing_that_loads(fresh, copying):
    killed = start(DELAY="60")
    while not list(fresh.glob("new.*/host-*.so")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert not list(fresh.glob("*.so"))
    a_step()


def test_processes_of_equal_numbers_that_share_a_folder_keep_files_whole(tmp_path):
    """As in containers. Threads have their process's number."""
    both, failures = threading.Barrier(2), []

    def write(new, content):
        new.write_text(content * 1000)
        both.wait(timeout=20)

    def keep(content):
        try:
            build.keep(tmp_path / "cache" / "file", lambda new: write(new, content))
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=keep, args=(content,)) for content in ("a", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file"]
    assert (tmp_path / "cache" / "file").read_text() in ("a" * 1000, "b" * 2000)


@pytest.mark.parametrize("chosen", [None, "g++", "no-such-compiler -m64"])
def test_without_a_compiler_another_node_s_library_is_taken(fresh, compiled, monkeypatch, chosen):
    fresh.mkdir(parents=True)
    shutil.copy(compiled, fresh / f"host-{build._key()}-any.so")
    (fresh / f"host-{build._key()}-newer.so").write_text("of another system's C library")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    if chosen:
        monkeypatch.setenv("CXX", chosen)
    a_step()


def test_without_a_compiler_a_library_of_another_processor_is_not(fresh, compiled, monkeypatch):
    fresh.mkdir(parents=True)
    shutil.copy(compiled, fresh / f"host-{build._key()}-any.so")
    monkeypatch.setattr(build, "_processor", lambda: "another")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="parsimony/kernels has no library of these sources"):
        a_step()


def test_in_a_cache_that_cannot_be_written_another_compiler_s_library_is_taken(
    fresh, compiled, copying, monkeypatch
):
    fresh.mkdir(parents=True)
    shutil.copy(compiled, fresh / f"host-{build._key()}-any.so")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (fresh, os.W_OK))
    a_step()
    assert not copying.read_text()


@pytest.mark.parametrize("words", ["{} -m64", "env {}", "env A='b c' {} -m64"])
def test_cxx_may_have_several_words(fresh, copying, monkeypatch, words):
    monkeypatch.setenv("CXX", words.format(shlex.quote(os.environ["CXX"])))
    a_step()
    assert copying.read_text().startswith("-m64 -std=" if "-m64" in words else "-std=")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_without_a_home_the_cache_is_in_the_user_s_own_temporary_folder(monkeypatch):
    """As in a container whose user passwd does not have."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    code = (
        "import os, tempfile\n"
        "from parsimony_kernels.runtime import build\n"
        "os.setgid(54321)\n"
        "os.setuid(54321)\n"
        "build.keep(build.cache_folder() / 'file', lambda new: new.write_text('whole'))\n"
        "tempfile.tempdir += '/taken'\n"
        "try:\n"
        "    build.cache_folder()\n"
        "except RuntimeError as error:\n"
        "    assert 'belongs to another user. Set HOME, or XDG_CACHE' in str(error)\n"
        "    print('loaded')\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o1777)
        (Path(temporary) / "taken" / "parsimony-54321").mkdir(parents=True)
        assert_loaded(start(code, TMPDIR=temporary))
        own = Path(temporary) / "parsimony-54321"
        assert (own / "kernels" / "file").read_text() == "whole"
        assert own.stat().st_mode & 0o777 == 0o700


def test_the_cache_s_folder_may_be_named_from_the_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert build.cache_folder() == Path.home() / "elsewhere" / "parsimony" / "kernels"


def test_torch_and_the_kernels_share_their_threads():
    """A second OpenMP would keep a team of threads of its own, spinning beside torch's."""
    code = (
        "import torch\n"
        "from parsimony_kernels.runtime import operands\n"
        "from parsimony_kernels.step import ops\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(10**6).add_(1).sum()\n"
        "count = lambda: len(__import__('os').listdir('/proc/self/task'))\n"
        "before = count()\n"
        "p, g = torch.zeros(1000, 1000), torch.ones(1000, 1000)\n"
        "ops.step(p, g, ops.Rule(lr=0.1), second=operands.Full(torch.zeros(1000, 1000)))\n"
        "assert count() == before, (before, count())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)
