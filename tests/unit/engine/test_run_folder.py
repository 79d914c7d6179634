import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dgc.comm.local import run_local
from engine.run_folder import RunFolderError, held

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from dgc.comm.local import run_local
from engine.run_folder import held

def work(comm):
    with held(Path(sys.argv[1]), comm):
        print("held", flush=True)
        sys.stdin.read()

run_local(1, work)
"""


def take(folder, num_ranks=1):
    """Take a folder, and let it go, as every rank of a job; return what each was told, if not."""

    def work(comm):
        try:
            with held(folder, comm):
                return None
        except RunFolderError as error:
            return str(error)

    return run_local(num_ranks, work)


def start_holder(folder):
    words = [sys.executable, "-c", HOLDER, str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    process.said = process.stdout.readline()
    return process


def test_a_second_job_is_told_who_holds_the_folder_until_that_is_killed(tmp_path):
    folder = tmp_path / "runs" / "name"
    first = start_holder(folder)
    assert first.said == "held\n", first.communicate()[1]
    for complaint in take(folder, num_ranks=2):
        assert re.search(
            rf"name is in use: process {first.pid} on \S+ has had it since 20", complaint
        )
    (alone,) = take(folder)
    assert "they have not found each other" in alone
    assert os.listdir(folder) == ["lock"]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert take(folder, num_ranks=2) == [None, None]
    assert take(folder) == [None]  # let go, it is free


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without flock, as Lustre is by default."""

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("engine.run_folder._SETTLED_S", 0.01)


def test_without_locks_the_holder_is_judged_by_what_it_wrote(tmp_path, no_locks):
    lock = tmp_path / "lock"

    def work(comm):
        with held(tmp_path, comm):
            return json.loads(lock.read_text()), *take(tmp_path)

    ((mine, second),) = run_local(1, work)
    assert f"process {os.getpid()} on {mine['host']}" in second
    assert take(tmp_path) == [None]  # it was let go
    lock.write_text(json.dumps(mine | {"started": "1"}))  # its number is another process's now
    assert take(tmp_path) == [None]
    for elsewhere in ({"host": "other"}, {"namespace": "pid:[1]"}):
        lock.write_text(json.dumps(mine | elsewhere))
        assert f"cannot be known here, on {mine['host']}: if it does not, remove {lock}" in str(
            take(tmp_path)
        )


def test_a_place_that_cannot_be_written_is_named_on_every_rank(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for complaint in take(tmp_path / "runs" / "name", num_ranks=2):
        assert "runs/name cannot be written" in complaint
        assert "--runs" in complaint
