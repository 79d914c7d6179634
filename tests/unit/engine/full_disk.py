"""What checkpoints, events and results do on a disk that is full or read-only.

Run by test_writing.py as a program, in a namespace of its own where `folder` is a small tmpfs.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from dgc.comm.local import run_local
from engine.checkpoint import CheckpointFolder
from engine.report import Reporter
from engine.writing import WriteError


def save_twice(folder: Path, spoil, beside: bool) -> None:
    """A checkpoint is written, the disk spoilt, and all ranks are told that no other fits."""

    def work(comm):
        checkpoints = CheckpointFolder(folder, comm)
        checkpoints.save(1, {"step": 1}, {"rank": comm.rank}, is_best=True)
        if comm.rank == 0:
            spoil()
        comm.barrier()
        content = torch.zeros(2**18 if comm.rank else 2**10)
        checkpoints.begin(2, {"step": 2}, {"mine": content}, is_best=False, beside=beside)
        try:
            checkpoints.finish()
        except WriteError as error:
            loaded = checkpoints.load_latest()
            assert loaded.shared == {"step": 1} and loaded.mine == {"rank": comm.rank}
            return str(error)

    messages = set(run_local(2, work))
    assert len(messages) == 1, messages
    print(*messages)
    assert not list(folder.glob("step-00000002*")) and not list(folder.glob("*.tmp"))


def report(folder: Path, spoil, recover) -> None:
    """Events that cannot be written stop nothing, and go on where there is room again."""
    reporter = Reporter(folder)
    reporter.start(0, {"seed": 1})
    reporter.scalars({"loss": 1.0}, 1)
    spoil()
    start = time.monotonic()
    for example in range(2, 3000):
        reporter.scalars({"loss": 1.0, "lr": 0.1}, example)
        if example % 100 == 0:
            reporter.flush()
    try:
        reporter.result({"seed": 1})
    except WriteError as error:
        print(error)
    recover()
    reporter.flush()
    reporter.scalars({"loss": 2.0}, 3000)
    reporter.close()
    assert time.monotonic() - start < 20
    assert not list(folder.glob("*.tmp"))
    assert len(list(folder.glob("events*"))) >= 2


def main(folder: Path) -> None:
    filler = folder / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(512))
                except OSError:
                    return

    def leave_little():
        fill()
        os.truncate(filler, filler.stat().st_size - 2**18)

    def make_read_only():
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)

    for beside in (False, True):
        save_twice(folder / f"run{beside}", leave_little, beside)
        filler.unlink()
    report(folder, fill, filler.unlink)
    save_twice(folder / "run", make_read_only, beside=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
