"""Is a damaged run ever taken up wrongly?

    python benchmarks/damage.py --mutations 10000 --seed 1 --json benchmarks/results/damage.json

Two runs of two ranks have two checkpoints each, a best one, config.json, events and a lock. Each
time a copy of the first is damaged in one to three places, and taken up by two ranks or three,
which also read the best checkpoint and start to report. What they read must be, to the bit, one of
the two checkpoints, or there must be a CheckpointError; a new run may begin only where no manifest
is left at all. Anything else is a fault: another state, another exception, more than 30 seconds.
The whole state of the other run counts as refused: the loop does so by its settings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1]))

from dgc.comm.local import LocalComm, run_local
from engine.checkpoint import CheckpointError, CheckpointFolder
from engine.manifest import to_bytes
from engine.report import Reporter
from engine.run_folder import RunFolderError, held

STEPS = (3, 12)
LIMIT_S = 30
VALUES = (None, True, -1, 0, 1, 2, 3, 10**30, 1.5, float("nan"), "", "x", "../x", "/etc/passwd",
          "\ud800", "step-00000003.shared.pt", [], [1], {}, {"x": 1})  # fmt: skip


def state(run: str, step: int, part: str) -> dict[str, Any]:
    """Return what a part of a checkpoint holds, unlike any other part."""
    generator = torch.Generator().manual_seed(
        hash((len(run), ord(run[0]), step, len(part))) % 2**31
    )
    weight = torch.randn(40, 25, generator=generator)
    return {
        "config": {"run": run}, "step": step, "part": part, "rates": (0.1, [step, True, None]),
        "model": OrderedDict(weight=weight, view=weight[3:5], half=weight.half(), none=weight[:0]),
        "random": bytes(range(256)),
    }  # fmt: skip


def write_run(folder: Path, run: str) -> None:
    def work(comm: LocalComm) -> None:
        checkpoints = CheckpointFolder(folder / "checkpoints", comm)
        for step in STEPS:
            shared, mine = state(run, step, "shared"), state(run, step, f"{comm.rank} " * comm.rank)
            checkpoints.save(step, shared, mine, is_best=step == STEPS[0])
        if comm.rank == 0:
            reporter = Reporter(folder)
            reporter.start(0, {"run": run})
            reporter.scalars({"loss": 1.0}, 1)
            reporter.close()

    run_local(2, work)
    (folder / "lock").write_text(json.dumps({"host": "h", "pid": 1, "since": "now"}))


def _is_plain(path: Path) -> bool:
    """Tell whether a path is a file of the damaged run itself, not a link to another."""
    return path.is_file() and not path.is_symlink()


class Damage:
    """Damages files of a run in ways drawn from a generator."""

    def __init__(self, draw: random.Random, other: Path) -> None:
        self._draw, self._other = draw, other
        self._ways: list[Callable[[Path], None]] = [
            self.flip, self.cut, self.lengthen, self.empty, self.remove, self.tear, self.shift,
            self.swap, self.take_of_other_run, self.make_strange,
        ]  # fmt: skip

    def once(self, folder: Path) -> str:
        """Damage something; return what was done."""
        files = sorted(filter(_is_plain, folder.rglob("*")))
        if not files:
            return "nothing left"
        path = self._draw.choice(files)
        is_manifest = path.match("step-*.json")
        if is_manifest and self._draw.random() < 0.6:
            way = self.mutate_value
        else:
            way = self._draw.choice(self._ways)
        way(path)
        return f"{way.__name__} {path.name}"

    def flip(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(self._draw.choice((1, 1, 2, 8)) if data else 0):
            data[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
        path.write_bytes(data)

    def cut(self, path: Path) -> None:
        os.truncate(path, self._draw.randrange(path.stat().st_size + 1))

    def lengthen(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self._draw.choice((b"\0", b"x" * 600, path.read_bytes())))

    def empty(self, path: Path) -> None:
        path.write_bytes(b"")

    def remove(self, path: Path) -> None:
        path.unlink()

    def tear(self, path: Path) -> None:
        """A block that was never written, as after a loss of power."""
        data = bytearray(path.read_bytes())
        start = self._draw.randrange(len(data) + 1)
        end = min(len(data), start + self._draw.choice((1, 16, 512, 4096)))
        data[start:end] = self._draw.choice((bytes(end - start), self._draw.randbytes(end - start)))
        path.write_bytes(data)

    def shift(self, path: Path) -> None:
        data = path.read_bytes()
        start = self._draw.randrange(len(data) + 1)
        path.write_bytes(data[start:] + data[:start])

    def swap(self, path: Path) -> None:
        """With another file of the run: of another step, rank or kind."""
        other = self._draw.choice(sorted(filter(_is_plain, path.parent.iterdir())))
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)

    def take_of_other_run(self, path: Path) -> None:
        """The same file of another run, or all of a step's."""
        stem = path.name.split(".")[0]
        alike = f"{stem}.*" if self._draw.random() < 0.3 else path.name
        for source in self._other.rglob(alike):
            if source.parent.name == path.parent.name or path.parent.name != "checkpoints":
                to = path.parent / source.name
                if _is_plain(to) or not os.path.lexists(to):
                    shutil.copyfile(source, to)

    def make_strange(self, path: Path) -> None:
        """No file any more: a folder, a pipe, or a link to nowhere, itself, outside or inside."""
        path.unlink()
        kind = self._draw.randrange(6)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            os.mkfifo(path)
        else:
            beside = "step-00000003.shared.pt"
            outside = str(self._other / "checkpoints" / path.name)
            path.symlink_to(("nowhere", path.name, outside, beside)[kind - 2])

    def mutate_value(self, path: Path) -> None:
        """Another value, key or order in a manifest, perhaps of format 1, perhaps with its hash."""
        try:
            content = json.loads(path.read_bytes())
            content["best"], content["parts"]  # it may have been damaged before
        except (ValueError, KeyError, TypeError):
            return
        place = content
        while (keys := list(place)) and (key := self._draw.choice(keys)) is not None:
            if isinstance(place[key], dict) and place[key] and self._draw.random() < 0.7:
                place = place[key]
                continue
            break
        kind = self._draw.randrange(4) if keys else 3
        if kind == 0:
            del place[key]
        elif kind == 1:
            place[str(self._draw.choice(VALUES))] = place.pop(key)
        elif kind == 2 and key != "best":  # a best that names another good part is a forgery
            place[key] = self._draw.choice(VALUES)
        elif keys:
            place[key], place[keys[0]] = place[keys[0]], place[key]
        way = self._draw.randrange(4)
        with contextlib.suppress(KeyError, TypeError):
            if way == 0:
                names = ("step", "world_size", "parts", "best")
                path.write_bytes(to_bytes(*(content[name] for name in names)))
                return
        if way == 1:
            content.pop("sha256", None), content.pop("format", None)
        path.write_text(json.dumps(content))


def take_up(folder: Path, num_ranks: int) -> str:
    """Take a run up as a job does; return which state was read, checked to the bit."""

    def work(comm: LocalComm) -> list[str]:
        done = []
        with contextlib.suppress(RunFolderError), held(folder, comm):
            done.append("held")
        checkpoints = CheckpointFolder(folder / "checkpoints", comm)
        try:
            loaded = checkpoints.load_latest()
            if loaded is None:
                assert not any((folder / "checkpoints").glob("step-*.json")), "a new run"
            done.append("new" if loaded is None else check(comm, loaded))
        except CheckpointError:
            done.append("refused")
        try:
            best = checkpoints.load_best()
            if not any(equal(best, state(run, STEPS[0], "shared")) for run in ("run", "other")):
                raise AssertionError(f"a wrong best: {best['config']}, step {best['step']}")
        except CheckpointError:
            pass
        if comm.rank == 0:
            reporter = Reporter(folder)
            reporter.start(STEPS[0], {"run": "run"})
            reporter.close()
        return done

    answers = run_local(num_ranks, work)
    assert len({answer[-1] for answer in answers}) == 1, answers
    return answers[0][-1]


def check(comm: LocalComm, loaded: Any) -> str:
    run, step = loaded.shared["config"]["run"], loaded.shared["step"]
    assert equal(loaded.shared, state(run, step, "shared")), "a wrong shared part"
    for rank, part in loaded.parts():
        assert equal(part, state(run, step, f"{rank} " * rank)), f"a wrong part of rank {rank}"
    if loaded.mine is not None:
        assert equal(loaded.mine, state(run, step, f"{comm.rank} " * comm.rank)), "a wrong part"
    if run == "other":
        raise CheckpointError("made with other settings")
    return "unharmed" if step == STEPS[-1] else "the one before"


def equal(one: Any, other: Any) -> bool:
    (ones, kind), (others, other_kind) = tree_flatten(one), tree_flatten(other)
    return kind == other_kind and all(
        torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b
        for a, b in zip(ones, others, strict=True)
    )


def campaign(num_mutations: int, seed: int, told: Callable[[str], None] = print) -> Counter[str]:
    """Damage and take up so many times; return how often each thing happened, faults too."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        sources = {run: Path(place) / run for run in ("run", "other")}
        for run, folder in sources.items():
            write_run(folder, run)
        for number in range(num_mutations):
            draw = random.Random(f"{seed} {number}")
            folder = Path(place) / "damaged"
            shutil.copytree(sources["run"], folder)
            damage = Damage(draw, sources["other"])
            what = [damage.once(folder) for _ in range(draw.choice((1, 1, 2, 3)))]
            result = outcome(folder, draw.choice((2, 3)))
            if result.startswith("fault"):
                told(f"{seed} {number}: {'; '.join(what)}: {result}")
                result = "fault"
            counts[result] += 1
            shutil.rmtree(folder)
    return counts


def outcome(folder: Path, num_ranks: int) -> str:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return take_up(folder, num_ranks)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "fault: " + "".join(traceback.format_exception(error))[-1500:]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the counts there")
    arguments = parser.parse_args()
    start = time.monotonic()
    counts = campaign(arguments.mutations, arguments.seed)
    result = {
        "mutations": arguments.mutations, "seed": arguments.seed,
        "seconds": round(time.monotonic() - start, 1), "outcomes": dict(counts.most_common()),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if counts["fault"] else 0)


if __name__ == "__main__":
    main()
