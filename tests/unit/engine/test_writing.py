import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgc.comm.local import run_local
from engine import hashed_files
from engine.checkpoint import CheckpointFolder
from engine.copies import on_host
from engine.writing import WriteError

ROOT = Path(__file__).parents[3]
SMALL_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
              'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"', "sh"]  # fmt: skip


def has_small_disks(folder):
    return not subprocess.run([*SMALL_DISK, str(folder), "true"], capture_output=True).returncode


def on_small_disk(folder, *words, timeout=300):
    """Run a program where a folder is a disk of 1 MiB of its own."""
    if not has_small_disks(folder):
        pytest.skip("no user namespaces: a small disk cannot be mounted here")
    ended = subprocess.run(
        [*SMALL_DISK, str(folder), sys.executable, *words], cwd=ROOT, timeout=timeout, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return ended.stdout


def test_a_full_disk_leaves_what_was_there_and_is_told_on_all_ranks(tmp_path):
    out = on_small_disk(tmp_path, "tests/unit/engine/full_disk.py", str(tmp_path))
    for run in ("runFalse", "runTrue"):
        line = rf"rank 1: {tmp_path}/{run} cannot be written by \S+ \(No space left on device; "
        assert re.search(line + r"0\.\d of 1\.0 MiB are free", out)
    told = rf"{tmp_path} cannot be written by .*No space left.*training goes on, events are missing"
    assert len(re.findall(told, out)) == 1
    assert re.search("complete, but has no result.json: .*No space left", out)
    assert re.search(r"Read-only file system; .*, read-only\)", out)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_reports_late_is_heard(tmp_path, monkeypatch, call, beside):
    real = getattr(os, call)

    def fail(file, *arguments):
        name = os.readlink(f"/proc/self/fd/{file}") if call == "fsync" else str(file)
        if "step-00000002.rank-0001" in name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, *arguments)

    def work(comm):
        checkpoints = CheckpointFolder(tmp_path, comm)
        checkpoints.save(1, {"step": 1}, {}, is_best=False)
        checkpoints.begin(2, {"step": 2}, {}, is_best=False, beside=beside)
        with pytest.raises(WriteError, match=r"rank 1: .*\(Input/output error; "):
            checkpoints.finish()
        shared = checkpoints.load_latest().shared
        checkpoints.save(3, {"step": 3}, {}, is_best=False)
        return shared, checkpoints.load_latest().shared

    monkeypatch.setattr(os, call, fail)
    assert run_local(2, work) == [({"step": 1}, {"step": 3})] * 2
    assert not list(tmp_path.glob("step-00000002*"))


def test_what_is_written_beside_training_is_the_state_when_it_was_begun(tmp_path):
    def work(comm):
        checkpoints = CheckpointFolder(tmp_path, comm)
        state = {"weight": torch.ones(2**20), "rows": {"step": 1}}
        checkpoints.begin(1, state, {}, is_best=False, beside=True)
        state["weight"].fill_(2)
        state["rows"]["step"] = 2
        checkpoints.finish()
        return checkpoints.load_latest().shared

    for shared in run_local(2, work):
        assert shared["weight"].eq(1).all() and shared["rows"] == {"step": 1}


def test_a_copy_has_the_bytes_of_the_original_in_a_file(tmp_path):
    whole = torch.arange(12.0)
    model = torch.nn.BatchNorm1d(3)
    rows = torch.sparse_coo_tensor([[1, 3]], [[1.0], [2.0]], (5, 1), check_invariants=True)
    content = {
        "whole": whole, "part": whole[2:5], "turned": whole.view(3, 4).T, "rows": rows,
        "model": model.state_dict(), "values": [1, (2.0, "x"), {3}, torch.Size([1])],
        "momentum": torch.nn.Parameter(torch.ones(2)), "none": torch.ones(0),
    }  # fmt: skip
    copied = on_host(content)
    files = [tmp_path / "original", tmp_path / "copy"]
    for path, value in zip(files, (content, copied), strict=True):
        with path.open("wb") as file:
            hashed_files.save(value, file)
    one, other = (hashed_files.load(path)[0] for path in files)
    assert files[0].stat().st_size == files[1].stat().st_size
    assert copied["model"]._metadata == content["model"]._metadata
    assert str(one) == str(other)
    assert copied["part"].data_ptr() == copied["whole"].data_ptr() + 8
