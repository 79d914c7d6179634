"""launch/doctor.py: what it concludes from what it finds."""

import subprocess
import sys

import pytest

from launch import doctor

GOOD = {"version": "0.28.1", "torch": "2.13.0", "mpi": True, "gloo": True, "nccl": False}


def test_horovod_built_as_we_need_it_is_ok():
    assert doctor.check_horovod(GOOD, "2.13.0").status == "ok"


@pytest.mark.parametrize(
    "facts, torch, says",
    [
        (GOOD, "2.14.1", "torch is 2.14.1"),
        (GOOD | {"mpi": False}, "2.13.0", "wheels"),
        ({"error": "undefined symbol: _ZN3c10"}, "2.13.0", "--again"),
    ],
)
def test_horovod_that_cannot_serve_is_missing_with_a_remedy(facts, torch, says):
    check = doctor.check_horovod(facts, torch)
    assert check.status == "missing"
    assert says in check.remedy


@pytest.mark.parametrize(
    "cxx, status, says",
    [
        ("env g++", "ok", "C++20"),
        ("g++ -m64", "ok", "C++20"),
        ("no-such-compiler -m64", "missing", "CXX is 'no-such-compiler -m64', which is no command"),
    ],
)
def test_the_compiler_is_the_one_that_the_kernels_would_take(monkeypatch, cxx, status, says):
    monkeypatch.setenv("CXX", cxx)
    check = doctor.check_compiler()
    assert check.status == status
    assert says in check.found


def test_where_all_is_compiled_a_compiler_is_optional(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for facts, status in (({"library": "host.so"}, "optional"), ({"error": "none"}, "missing")):
        monkeypatch.setattr(doctor, "ask", lambda *_, facts=facts, **__: facts)
        compiler = next(check for check in doctor.all_checks() if check.name == "compiler")
        assert compiler.status == status


def test_a_torchvision_that_cannot_be_imported_is_missing_with_the_remedy():
    broken = doctor.check_torchvision({"error": "operator torchvision::nms does not exist"})
    assert (broken.status, broken.remedy) == ("missing", "run launch/setup.sh --again")
    assert doctor.check_torchvision({"version": "0.28.0"}).status == "ok"


@pytest.mark.parametrize(
    "banner, status",
    [
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to ...", "ok"),
        ("mpirun (Open MPI) 5.0.3\n", "missing"),  # rejects the options that horovodrun writes
        ("HYDRA build details:\n    Version: 4.1\n", "missing"),  # MPICH
        ("", "missing"),
    ],
)
def test_only_open_mpi_4_will_do(banner, status):
    assert doctor.check_mpirun("/opt/bin/mpirun", banner).status == status


def test_a_library_with_another_mpi_than_mpirun_is_found(tmp_path):
    mpirun = str(tmp_path / "bin" / "mpirun")
    same = {"version": "4", "libmpi": [str(tmp_path / "lib" / "libmpi.so.40")]}
    other = {"version": "4", "libmpi": ["/usr/lib/libmpi.so.40"]}
    assert doctor.check_same_mpi("mpi4py", same, mpirun).status == "ok"
    assert doctor.check_same_mpi("mpi4py", other, mpirun).status == "missing"


def test_a_probe_that_hangs_or_crashes_is_an_answer():
    assert doctor.run(sys.executable, "-c", "import time; time.sleep(9)", seconds=1)[0] == 124
    assert "boom" in doctor.ask("raise SystemExit('boom')")["error"]


def test_without_horovod_torch_alone_is_asked_for(monkeypatch):
    facts = {"version": "2.13.0", "cuda": None, "gpus": [], "gloo": True}
    monkeypatch.setattr(doctor, "ask", lambda code, seconds=60: (
        facts if code is doctor.ASK_TORCH else {"error": "No module named 'horovod'"}
    ))  # fmt: skip
    for wanted, status in (("0", "missing"), ("1", "optional")):
        monkeypatch.setenv("PARSIMONY_WITHOUT_HOROVOD", wanted)
        statuses = {check.name: check.status for check in doctor.all_checks()}
        assert statuses["horovod"] == status
        assert statuses["torchrun"] == "ok"
        assert ("mpi4py" in statuses) == (wanted == "0")
    assert doctor.check_torchrun(facts | {"gloo": False}).status == "missing"


def test_an_empty_environment_lacks_everything_and_is_told_the_remedy(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    done = subprocess.run(
        [tmp_path / "bin" / "python", doctor.__file__],
        env={"PARSIMONY_VENV": str(tmp_path), "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "missing: compiler, torch, horovod, mpirun, mpi4py" in done.stdout
    assert "launch/setup.sh" in done.stdout
