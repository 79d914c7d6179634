"""Kill jobs at random moments, in every way, and see that each goes on to the same bits.

    python benchmarks/soak.py --kills 200 --seed 1

A run is started by launch/*.sh --restarts. Then, again and again, something of it is killed: a
rank, all ranks, the launcher, its supervisor, a loader process, a host, everything; or its disk is
full, or its newest checkpoint is damaged as well. Half of the kills come while a checkpoint is
written, a quarter while the job starts again. The supervisor starts it again, and where the
supervisor was killed this does, by the same command. When the run is complete its parameters must
be those of an undisturbed run, and no process and no temporary file may be left.

Prints a row a run, and the seconds that a kill cost: from the kill to the first checkpoint of a
later step than there was then, by a new start, with checkpoints at every step. Under MPI, Gloo,
torchrun, and mpirun on four emulated hosts (processes of this machine, each host's below an agent
of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.mishaps import damage, fill_up, victims
from launch import leftovers
from launch.output import newest_step
from tests.marked import Marked, marked

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "MPI": ["launch/train.sh", "-np", "2"],
    "Gloo": ["launch/train.sh", "-np", "2", "--gloo"],
    "torchrun": ["launch/train.sh", "-np", "2", "--torch"],
    "four hosts": ["launch/mpirun.sh", "-H", "a:1,b:1,c:1,d:1"],
}
SETTINGS = {
    "train.num_epochs": 8, "train.lr_warmup_epochs": 1, "train.batch_size_per_rank": 8,
    "dgc.density": 0.01, "dgc.density_warmup_epochs": 1, "data.samples_per_epoch": 1024,
    "data.num_workers_per_rank": 1, "checkpoint.every_steps": 1,
}  # fmt: skip
CONFIGS = ["configs/digits/resnet20.py", "configs/dgc/wm5.py", "configs/optim/parsimony.py",
           "tests/integration/perceptron.py"]  # fmt: skip
VICTIMS = ("rank", "rank", "all ranks", "launcher", "supervisor", "loader", "host", "everything")
SIGNALS = (signal.SIGKILL,) * 5 + (signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGINT)
AGENT = """#!/bin/sh
HOST_OF_SOAK=$1
export HOST_OF_SOAK
shift
exec sh -c "$*"
"""
PATIENCE_S = 300  # for a job to make a step after a kill


class Job:
    """A run under a launcher, until it is complete; whoever supervises it."""

    def __init__(
        self, kind: str, runs: Path, processes: Marked, restarts: int = 1000, **settings: Any
    ) -> None:
        """settings: those of SETTINGS that are others here, with __ for the dot."""
        changed = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
        flags = [w for name, value in changed.items() for w in (f"--configs.{name}", str(value))]
        self._words = [*LAUNCHERS[kind], "--restarts", str(restarts), "--configs", *CONFIGS,
                       *flags, "--runs", str(runs)]  # fmt: skip
        self.runs, self.processes, self.log = runs, processes, runs.parent / f"{runs.name}.log"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def keep_going(self) -> None:
        """Start the job where nothing of it runs any more, and it is not complete."""
        if self._process is None or (self._process.poll() is not None and not self.is_complete):
            self.processes.left(30)
            self.start()

    @property
    def is_complete(self) -> bool:
        return any(self.runs.glob("*/result.json"))

    @property
    def parameter_hash(self) -> str:
        (path,) = self.runs.glob("*/result.json")
        return json.loads(path.read_text())["parameter_hash"]

    def checkpoints(self) -> list[Path]:
        return sorted(self.runs.glob("*/checkpoints/step-*.json"))

    def newest_step(self) -> int:
        return max((0, *map(newest_step, self.runs.glob("*"))))

    def num_starts(self) -> int:
        return self.log.read_text(errors="replace").count("training begins with step")

    def is_writing(self) -> bool:
        """Whether a part is there of a step that has no manifest yet."""
        newest = f"step-{self.newest_step():08d}"
        names = (path.name.partition(".")[0] for path in self.runs.glob("*/checkpoints/step-*.pt*"))
        return any(name > newest for name in names)

    def wait(self, reached: Callable[[], bool], pause: float = 0.001) -> None:
        """Wait until something holds, or the run is complete; keep the job going meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached() and not self.is_complete:
            self.keep_going()
            if time.monotonic() > deadline:
                shutil.copy(self.log, tempfile.gettempdir())
                raise RuntimeError(f"no step within {PATIENCE_S} s:\n{self.tail()}")
            time.sleep(pause)

    def finish(self) -> None:
        deadline = time.monotonic() + 600
        while not self.is_complete or (self._process and self._process.poll() is None):
            self.keep_going()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run does not end:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def kill_once(job: Job, draw: random.Random, can_fill: bool) -> tuple[str, float]:
    """Kill something at some moment; return what, and how long it was to the next new step."""
    moment = draw.choice(("writing", "writing", "training", "starting"))
    begun = job.newest_step()
    if moment == "starting":
        time.sleep(draw.uniform(0, 4))  # the kill before is not over yet
    else:
        job.wait(lambda: job.newest_step() > begun + draw.randrange(1, 25))
        if moment == "writing":
            job.wait(job.is_writing, pause=0)
            time.sleep(draw.choice((0, 0.0005, 0.001, 0.003)))
    step, starts, at = job.newest_step(), job.num_starts(), time.monotonic()
    if can_fill and draw.random() < 0.06:
        fill_up(job)
        what = "disk full"
    else:
        kind, number = draw.choice(VICTIMS), draw.choice(SIGNALS)
        found = victims(kind, job.processes, draw)
        if kind in ("loader", "everything"):  # loaders leave Ctrl-C to their rank
            number = signal.SIGKILL
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        what = f"{kind if found else 'nothing there'}, {moment}"
        if found and draw.random() < 0.1 and damage(job, draw):
            what += ", damaged"
            step = min(step, job.newest_step())
    if not what.startswith("nothing"):
        job.wait(lambda: job.num_starts() > starts and job.newest_step() > step, 0.01)
    return what, time.monotonic() - at


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of 96 MiB there, if this may; yield whether it is."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=96m", "parsimony-soak", str(folder)]
    is_small = subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def one_run(
    kind: str, folder: Path, num_kills: int, draw: random.Random, expected: str
) -> tuple[Counter[str], list[float], bool]:
    """Kill a run so often, or until it is complete; return what was killed, the seconds it cost,
    and whether all is as it should be in the end."""
    killed: Counter[str] = Counter()
    seconds = []
    with small_disk(folder) as can_fill, marked() as processes:
        job = Job(kind, folder, processes)
        job.start()
        while sum(killed.values()) < num_kills and not job.is_complete:
            what, lost = kill_once(job, draw, can_fill)
            if not job.is_complete and not what.startswith("nothing"):
                killed[what] += 1
                seconds.append(lost)
        job.finish()
        left = processes.left(10)
        is_same = job.parameter_hash == expected
        temporary = [*folder.rglob("*.tmp"), *folder.rglob("*.new"), *leftovers.left()]
        is_right = is_same and not left and not temporary
        if not is_right:
            print(f"WRONG: same bits {is_same}, left {left}, {temporary}\n{job.tail()}", flush=True)
            shutil.copy(job.log, folder.parent / "wrong.log")
    return killed, seconds, is_right


def undisturbed(kind: str, folder: Path) -> str:
    with marked() as processes:
        folder.mkdir()
        job = Job(kind, folder, processes, restarts=0, checkpoint__every_steps=None)
        job.start()
        job.finish()
        return job.parameter_hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--kills-per-run", type=int, default=16)
    arguments = parser.parse_args()
    draw, all_killed, all_seconds, num_runs, num_right = (
        random.Random(arguments.seed), Counter(), [], 0, 0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="parsimony-soak-") as temporary:
        top = Path(temporary)
        agent = top / "agent"
        agent.write_text(AGENT)
        agent.chmod(0o755)
        os.environ["OMPI_MCA_plm_rsh_agent"] = str(agent)
        os.environ["OMPI_MCA_mpi_yield_when_idle"] = "1"  # there are more ranks than cores
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ.setdefault("PARSIMONY_VENV", str(Path(sys.executable).parents[1]))
        expected = {kind: undisturbed(kind, top / f"calm {kind}".replace(" ", "-"))
                    for kind in arguments.launchers}  # fmt: skip
        while sum(all_killed.values()) < arguments.kills:
            kind = arguments.launchers[num_runs % len(arguments.launchers)]
            most = min(arguments.kills_per_run, arguments.kills - sum(all_killed.values()))
            killed, seconds, is_right = one_run(
                kind, top / f"run{num_runs}", most, draw, expected[kind]
            )
            num_runs, num_right = num_runs + 1, num_right + is_right
            all_killed += killed
            all_seconds += seconds
            print(f"run {num_runs}, {kind}: {sum(killed.values())} kills, median "
                  f"{statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s, "
                  f"{'equal bits, nothing left' if is_right else 'WRONG'}", flush=True)  # fmt: skip
    print(f"\n{sum(all_killed.values())} kills in {num_runs} runs, of which {num_right} ended with "
          f"the bits of an undisturbed one and left nothing; seconds a kill: median "
          f"{statistics.median(all_seconds):.1f}, worst {max(all_seconds):.1f}\n")  # fmt: skip
    for what, count in sorted(all_killed.items()):
        print(f"| {what} | {count} |")
    sys.exit(0 if num_right == num_runs else 1)


if __name__ == "__main__":
    main()
