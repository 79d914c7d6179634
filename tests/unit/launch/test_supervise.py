"""launch/supervise.py with small programs as its jobs; real ones: tests/integration/."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.hosts import narrowed, silent_hosts
from tests.marked import marked

REPO = Path(__file__).resolve().parents[3]
TRAINS = "print('training begins with step 1', flush=True)\n"


@pytest.fixture
def processes():
    with marked() as processes:
        yield processes


def start(code: str, *options: str, **env: str) -> subprocess.Popen:
    """Start a job that is this Python code; `open` in it sees the folder that it is started in."""
    words = [sys.executable, "-m", "launch.supervise", *options, "--", sys.executable, "-Sc", code]
    return subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(REPO)} | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup too
    )  # fmt: skip


def run(*arguments: str, **env: str) -> tuple[int, str, str]:
    job = start(*arguments, **env)
    out, err = job.communicate(timeout=60)
    return job.returncode, out.decode(), err.decode()


def counting(folder: Path, then: str) -> str:
    """Return code that numbers its starts as `start`, from 1, in the folder."""
    return (
        f"import os, sys; from pathlib import Path; folder = Path({str(folder)!r})\n"
        "with (folder / 'starts').open('a') as file: file.write('x')\n"
        "start = (folder / 'starts').stat().st_size\n" + then
    )


def test_what_a_job_prints_and_returns_is_passed_on_as_it_is():
    code = "import sys; print('out\\rput'); sys.stderr.write('err'); sys.exit(7)"
    assert run(code) == (7, "out\rput\n", "err")
    status, out, err = run(code, "--restarts", "1")
    assert (status, out) == (7, "out\rput\nout\rput\n")  # started twice
    assert err.startswith("errlaunch: starting again in 1 s\nerrlaunch: ")


def test_a_job_that_fails_is_started_again_until_it_ends_well(tmp_path):
    code = counting(tmp_path, TRAINS + "sys.exit(start < 3)")
    status, out, err = run(code, "--restarts", "2")
    assert status == 0
    assert out.count("training begins") == 3
    assert [int(s) for s in re.findall(r"starting again in (\d+) s", err)] == [1, 2]


def test_failures_without_a_new_checkpoint_end_it_with_the_first_and_the_last_message(tmp_path):
    code = counting(tmp_path, TRAINS + (
        "print('rank 1 failed and ends the job:', f'reason {start}', sep='\\n')\n"
        "sys.exit(3)"
    ))  # fmt: skip
    status, out, err = run(code, "--restarts", "1")
    assert status == 3
    assert out.count("training begins") == 2
    assert "failed 2 times without a new checkpoint: giving up" in err
    first, last = err.split("First:")[1].split("Last:")
    assert "reason 1" in first and "reason 2" in last


def test_after_progress_it_is_started_at_once_and_failures_are_counted_anew(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code = counting(tmp_path, (
        "print('folder of this run:', folder, flush=True)\n" + TRAINS +
        "import time; time.sleep(0.3)  # real ranks take longer to their first checkpoint\n"
        "(folder / f'checkpoints/step-{start:08d}.json').touch()\n"
        "sys.exit(start < 4)"
    ))  # fmt: skip
    status, out, err = run(code, "--restarts", "1")
    assert (status, out.count("training begins")) == (0, 4)
    assert "starting again in" not in err


def test_a_wrong_setting_is_not_tried_again_and_again(tmp_path):
    code = counting(tmp_path, (
        "sys.exit(f'rank {start} failed and ends the job:\\nconfigs.train.lr = -1')"
    ))  # fmt: skip
    status, _, err = run(code, "--restarts", "50")
    assert status == 1
    assert "twice the job failed alike before its first step: giving up" in err
    assert err.count("starting again") == 1


def test_what_lies_among_checkpoints_and_how_processes_are_named_does_not_matter(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000007.old.json").touch()  # a person's copy
    cut = ("import ctypes, sys; ctypes.CDLL(None).prctl(15, 'Dienst-für-öäüü'.encode())\n"
           "print('named', flush=True); sys.stdin.read()")  # fmt: skip
    words = [sys.executable, "-Sc", cut]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"named\n"
        code = counting(tmp_path, (
            f"print('folder of this run:', {str(tmp_path)!r}, flush=True)\n" + TRAINS +
            "print('x' * 300_000); sys.exit(start < 2)"
        ))  # fmt: skip
        status, out, _ = run(code, "--restarts", "1")
        other.stdin.close()
    assert (status, out.count("training begins")) == (0, 2)


def test_a_start_that_ends_well_is_not_given_the_status_of_one_before(tmp_path):
    code = counting(tmp_path, TRAINS + (
        "if start == 1: open(os.environ['PARSIMONY_SUPERVISED'], 'w').write('130'); sys.exit(1)"
    ))  # fmt: skip
    assert run(code, "--restarts", "1")[0] == 0


def test_what_goes_wrong_once_a_job_has_trained_is_tried_again_as_often_as_asked(tmp_path):
    code = counting(tmp_path, "print(f'training begins' * (start == 1)); sys.exit('no such file')")
    status, _, err = run(code, "--restarts", "2")
    assert status == 1
    assert "the job failed 3 times without a new checkpoint: giving up" in err


def test_nothing_of_a_job_is_left_behind(processes):
    """A process in a session of its own, deaf to SIGTERM and SIGHUP, whose parent has ended."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        "    os.close(1); os.close(2)\n"
        "    time.sleep(100)\n"
        "    os._exit(0)\n"
    )
    assert run(code)[0] == 0
    assert processes.words() == {}


def test_a_second_signal_ends_what_does_not_listen(processes):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    job = start(code)
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert job.poll() is None  # it is asked only: this job has no ranks that could save
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    assert processes.left() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_pause_ends_it(number):
    job = start(TRAINS + "raise SystemExit(1)", "--restarts", "9")
    for line in job.stderr:
        if b"starting again in 2 s" in line:
            break
    job.send_signal(number)
    assert job.wait(20) == 128 + number


def test_a_launcher_that_is_not_there_is_named():
    words = [sys.executable, "-m", "launch.supervise", "--", "no-such-mpirun", "-np", "2"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "launch: no-such-mpirun -np 2 cannot be started" in done.stderr


def test_a_killed_supervisor_takes_its_job_along(processes):
    job = start("import time; print('ready', flush=True); time.sleep(100)")
    assert job.stdout.readline() == b"ready\n"
    job.kill()
    assert processes.left() == {}


def test_nobody_reading_the_output_does_not_stop_a_job(tmp_path):
    code = f"for i in range(20000): print('x' * 50)\nopen({str(tmp_path / 'done')!r}, 'w')"
    job = start(code, "--restarts", "1")
    job.stdout.close()
    job.wait(60)
    assert (tmp_path / "done").exists()


@pytest.fixture
def rank(tmp_path) -> str:
    """A program that a supervisor takes for a rank: it ends well by SIGUSR1, in a while."""
    path = tmp_path / "train.py"
    path.write_text(
        "import signal, sys, time\n"
        "def stop(*_): time.sleep(0.5); print('stopped by a signal'); sys.exit(0)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    return f"import os, sys; os.execv(sys.executable, [sys.executable, {str(path)!r}])"


@pytest.mark.parametrize("restarts", ["0", "3"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)],
)
def test_ranks_are_asked_to_save_whatever_the_signal(rank, number, status, restarts):
    job = start(rank, "--restarts", restarts, RANK="0")
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(number)
    job.send_signal(number)  # at once: a terminal's Ctrl-C, that a shell passes on too
    assert job.wait(20) == status
    assert job.stdout.read() == b"stopped by a signal\n"


def test_ranks_that_cannot_save_yet_are_ended_at_once(tmp_path, processes):
    (tmp_path / "train.py").write_text("import time; print('ready', flush=True); time.sleep(100)")
    words = [sys.executable, "-Su", str(tmp_path / "train.py")]
    job = start(f"import os; os.execv({words[0]!r}, {words!r})", RANK="0")
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    assert processes.left() == {}


def test_ranks_that_were_interrupted_themselves_are_not_started_again():
    code = (
        "import os; open(os.environ['PARSIMONY_SUPERVISED'], 'w').write('130')\n"
        "print('stopped by a signal')"
    )
    assert run(code, "--restarts", "3") == (130, "stopped by a signal\n", "")


@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGUSR1, "requeue 77\n"), (signal.SIGTERM, "")]
)
def test_slurm_is_asked_to_queue_the_job_again_only_when_its_time_is_up(
    rank, tmp_path, number, asked
):
    log, scontrol = tmp_path / "asked", tmp_path / "scontrol"
    log.touch()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    scontrol.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = start(rank, "--requeue", RANK="0", SLURM_JOB_ID="77", PATH=path)
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(number)
    assert job.wait(20) == 0
    assert log.read_text() == asked


# ---- hosts ---------------------------------------------------------------------------------------

COMMAND = ["mpirun", "-np", "12", "-H", "a:8,b:4", "python", "train.py", "-H", "x", "-np", "5"]


@pytest.fixture
def only_a_answers(tmp_path, monkeypatch):
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\n[ "$1" = a ] && shift && exec "$@"\n')
    agent.chmod(0o755)
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", str(agent))


def test_a_host_that_does_not_answer_is_left_out(only_a_answers):
    command, problem = narrowed(COMMAND, 1)
    assert problem is None
    assert command == [*"mpirun -np 8 -H a:8".split(), *COMMAND[5:]]


@pytest.mark.parametrize(
    ("hosts", "left"),
    [
        ("a slots=8 max-slots=8\n# b is slow\n\nb  slots = 4  # it is\n", "-H a:8"),
        ("a slots=8\nme@b slots=8\n", "-hostfile {}"),  # -H names no users
        ("a max_slots=16 slots=8\nb slots=4\n", "-H a:8"),
        ("a slots=2\na slots=1\nb slots=4\n", "-H a:2,a:1"),
        ("a slots=8\nb\n", "-hostfile {}"),  # mpirun knows how many b has
        ("a slots=8\n", "-hostfile {}"),
        ("", "-hostfile {}"),
    ],
)
def test_a_host_of_a_file_that_does_not_answer_is_left_out(hosts, left, only_a_answers, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(hosts)
    command = ["mpirun", "-hostfile", str(path), "-mca", "pml", "ob1", "python", "train.py"]
    expected = ["mpirun", *left.format(path).split(), *command[3:]]
    assert narrowed(command, 1) == (expected, None)
    counted = narrowed(["mpirun", "-np", "9", *command[1:]], 1)[0]
    num_ranks = {"-H a:8": "8", "-H a:2,a:1": "3"}.get(left, "9")
    assert counted == ["mpirun", "-np", num_ranks, *expected[1:]]


def test_too_few_ranks_are_not_started(only_a_answers):
    command, problem = narrowed(COMMAND, 9)
    assert command == COMMAND
    assert "b do not answer" in problem and "9 or more (--min-np)" in problem


def test_a_host_that_never_answered_while_the_job_ran_there_is_kept(only_a_answers):
    assert silent_hosts(COMMAND) == ["b"]
    assert narrowed(COMMAND, 1, {"b"}) == (COMMAND, None)


def test_this_machine_always_answers(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", "false")
    command = ["mpirun", "-np", "4", "-H", "localhost", "python", "train.py"]
    assert narrowed(command, 1) == (command, None)
