"""Checkpoints: one shared part written by rank 0, one part a rank, a manifest that names them all.

    checkpoints/step-00000440.shared.pt            model, optimizer, schedule, position
    checkpoints/step-00000440.rank-0001-of-0002.pt residuals, velocities, buffers, random states
    checkpoints/step-00000440.json                 names, sizes and SHA-256 of the above, and of
                                                   the shared part of the best step so far

Every file is written under a temporary name, hashed while it is written, and flushed to disk; when
all ranks have done so, all files are renamed. The manifest comes last, so a checkpoint is either
complete or does not exist; when a rank cannot write, all ranks remove what they have written of it,
and say so. Parts may be written beside training, from copies. Otherwise neither writing nor reading
copies tensors, and both pass over a file once. Parts hold tensors and plain values only, so that
`torch.load(weights_only=True)` reads them; a value that it would refuse is refused before any file
is written. Each rank writes its own part on the host where it runs, and reads it there if the job
has as many ranks again. If it has more or fewer, each part is read by a rank that finds it on its
disk. So hosts need not share a disk, as long as none of those that wrote is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import manifest, reading
from engine.interfaces import Collectives
from engine.manifest import CheckpointError
from engine.parts import assign, is_later, may_remove, part_name, shared_name, step_name
from engine.plain import plain
from engine.writing import WriteError, Writing, cannot_write, write_atomically


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose parts have all been read without fault."""

    _folder: CheckpointFolder
    _manifest: dict[str, Any]
    shared: dict[str, Any]
    mine: dict[str, Any] | None
    """This rank's part; None if another number of ranks wrote the checkpoint."""
    _readers: list[int]

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self._manifest["world_size"]

    def parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (rank that wrote it, part) of those that this rank reads, one after another.

        Over all ranks of this job they are the parts of all ranks that wrote.
        """
        for old_rank, reader in enumerate(self._readers):
            if reader == self._folder.rank and self.mine is not None:
                yield old_rank, self.mine
            elif reader == self._folder.rank:
                name = part_name(self._manifest["step"], old_rank, self.world_size)
                part = self._manifest["parts"][name]
                yield old_rank, reading.read_part(self._folder.path, name, part)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that was begun and is not finished."""

    step: int
    is_best: bool
    writing: Writing


class CheckpointFolder:
    """The checkpoints of one run, as one rank sees them.

    All methods except `begin` are collectives: every rank must call them.
    """

    def __init__(self, folder: Path, comm: Collectives, keep: int = 2) -> None:
        self.path, self._comm, self._keep = folder, comm, keep
        self.rank = comm.rank
        self._pending: _Pending | None = None
        self._best: dict[str, Any] = {}  # file name -> size and checksum of the best shared part
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"rank {self.rank}: {cannot_write(folder, error)}") from error

    def save(
        self, step: int, shared: dict[str, Any], worker: dict[str, Any], *, is_best: bool
    ) -> None:
        """Write a checkpoint of `step`, then delete all but the newest `keep` and the best one."""
        self.begin(step, shared, worker, is_best=is_best)
        self.finish()

    def begin(
        self, step: int, shared: dict[str, Any], worker: dict[str, Any],
        *, is_best: bool, beside: bool = False,
    ) -> None:  # fmt: skip
        """Write this rank's parts; with `beside`, copy them now and write them on a thread.

        `finish` must follow, and makes them a checkpoint.
        Raises: CheckpointError, before any file changes, if a value could not be read back.
        """
        assert self._pending is None, "begin() before the end of another"
        shared, worker = readable(shared, "shared"), readable(worker, "worker")
        contents = {part_name(step, self.rank, self._comm.world_size): worker}
        if self.rank == 0:
            contents[shared_name(step)] = shared
        writing = Writing(self.path, contents, beside=beside)
        self._pending = _Pending(step, is_best, writing)

    @property
    def pending_step(self) -> int | None:
        """The step of the checkpoint that was begun and is not finished."""
        return None if self._pending is None else self._pending.step

    @property
    def is_written(self) -> bool:
        """Whether `finish` need not wait for this rank."""
        return self._pending is not None and self._pending.writing.is_done

    def finish(self) -> None:
        """Make what was begun a checkpoint, when all ranks have written; delete old ones.

        Raises: WriteError, on all ranks, if one of them cannot write. The checkpoint before is then
            the newest, and nothing is left of this one.
        """
        pending, self._pending = self._pending, None
        assert pending is not None, "finish() without begin()"
        step, path = pending.step, self.path / f"{step_name(pending.step)}.json"
        try:
            parts = self._together(pending.writing.wait)
            self._together(pending.writing.publish)
            best = self._best
            if pending.is_best:
                best = {shared_name(step): parts[shared_name(step)]}
            content = manifest.to_bytes(step, self._comm.world_size, parts, best)
            self._together(lambda: self._write_manifest(path, content))
        except WriteError:
            pending.writing.remove()
            raise
        self._best = best
        self._remove_old(step)

    def mark_best(self, step: int) -> None:
        """Make the newest checkpoint, which is of `step`, the best one as well.

        Only its manifest is written anew: while its parts were, it would be no checkpoint.
        Raises: WriteError, on all ranks, if rank 0 cannot write it. All is then as it was.
        """
        assert self._pending is None, "mark_best() before the end of another"
        path = self.path / f"{step_name(step)}.json"

        def write() -> dict[str, Any]:
            content, problem = manifest.read(path)
            if content is None:
                raise OSError(0, problem)
            best = {shared_name(step): content["parts"][shared_name(step)]}
            data = manifest.to_bytes(step, content["world_size"], content["parts"], best)
            write_atomically(path, lambda file: file.write(data))
            return best

        self._best = self._together(write if self.rank == 0 else dict)
        self._remove_old(step)

    def _write_manifest(self, path: Path, content: bytes) -> dict[str, Any]:
        if self.rank == 0:
            try:
                write_atomically(path, lambda file: file.write(content))
            except OSError:
                path.unlink(missing_ok=True)  # its parts will be removed
                raise
        return {}

    def _together(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do this rank's share of some writing; return what all ranks' shares returned."""
        result, problem = {}, None
        try:
            result = work()
        except OSError as error:
            problem = f"rank {self.rank}: {cannot_write(self.path, error)}"
        answers = self._comm.all_gather_object((result, problem))
        if problems := [text for _, text in answers if text]:
            raise WriteError(
                f"no checkpoint was written, the one before is intact: {'; '.join(problems)}. Make "
                f"room or mend the disk and start the same command again; checkpoint.on_error = "
                f'"continue" trains on without'
            )
        return {name: part for files, _ in answers for name, part in files.items()}

    def load_latest(self) -> Loaded | None:
        """Return the newest checkpoint that is complete, whatever number of ranks wrote it.

        Rank 0 names the candidates, newest first, and the first one of which every part is read
        without fault is taken. Rank 0 then sends its shared part tensor by tensor, so that a rank
        needs little memory beyond the result: 64 MiB, or as much as the values that are no tensors.
        Returns: None if the folder has no checkpoint.
        Raises: CheckpointError if there are checkpoints and none of them can be read.
        """
        manifests = self._on_rank_0(lambda: reading.candidates(self.path))
        complaints = []
        for content in manifests:
            readers = self._readers(content)
            contents, problem = self._try(content, readers)
            problems = [p for p in self._comm.all_gather_object(problem) if p]
            if not problems:
                shared = dict(self._comm.broadcast_object(contents[0]))
                self._best = content["best"]
                for complaint in complaints if self._comm.rank == 0 else []:
                    print(f"skipped a damaged checkpoint: {complaint}", flush=True)
                return Loaded(self, content, shared, contents[1], readers)
            complaints += problems
            del contents
        if complaints:
            raise CheckpointError(
                f"no checkpoint in {self.path} can be read: {'; '.join(complaints)}. "
                f"Put the files back, or delete the folder to start anew"
            )
        return None

    def _readers(self, manifest: dict[str, Any]) -> list[int]:
        """Return which rank of this job reads the part of each rank that wrote. A collective.

        As many ranks read their own. Others read what is on their disk, each as much as another.
        """
        written_by = manifest["world_size"]
        if written_by == self._comm.world_size:
            return list(range(written_by))
        names = [part_name(manifest["step"], rank, written_by) for rank in range(written_by)]
        mine = [os.path.isfile(self.path / name) for name in names]
        return assign(self._comm.all_gather_object(mine))

    def load_best(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the shared part of rank 0's best checkpoint, except for the keys in `without`."""
        return self._on_rank_0(lambda: self._read_best(without))

    def _read_best(self, without: Collection[str]) -> dict[str, Any]:
        try:
            best = [m["best"] for m in reading.manifests(self.path) if m["best"]]
            if not best:
                raise CheckpointError(f"{self.path} holds none")
            ((name, part),) = best[0].items()
            content = reading.read_part(self.path, name, part)
        except CheckpointError as error:
            raise CheckpointError(f"no best checkpoint to evaluate: {error}. Train first") from None
        return {key: value for key, value in content.items() if key not in without}

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Return on all ranks what rank 0's work returns, or raise its CheckpointError."""
        result: Any = None
        if self.rank == 0:
            try:
                result = work()
            except CheckpointError as error:
                result = error
        result = self._comm.broadcast_object(result)
        if isinstance(result, CheckpointError):
            raise result
        return result

    def _try(self, manifest: dict[str, Any], readers: list[int]) -> tuple[list[Any], str | None]:
        """Read the parts that are this rank's to read, of which it keeps no more than its own.

        Returns: the shared part (on rank 0), this rank's own, if it has one, and what is wrong.
        """
        step, written_by, rank = manifest["step"], manifest["world_size"], self._comm.rank
        contents: list[Any] = [None, None]
        try:
            if rank == 0:
                name = shared_name(step)
                contents[0] = reading.read_part(self.path, name, manifest["parts"][name])
            for old_rank in (old for old, reader in enumerate(readers) if reader == rank):
                name = part_name(step, old_rank, written_by)
                content = reading.read_part(self.path, name, manifest["parts"][name])
                if written_by == self._comm.world_size:
                    contents[1] = content
                del content
        except CheckpointError as error:
            return [None, None], f"rank {rank}: {error}"
        return contents, None

    def _remove_old(self, step: int) -> None:
        """Delete manifests that are old, or later than `step`, which was just written (rank 0),
        then this rank's files that no manifest names any more.

        One that is later could not be read when this job began, and its steps are made anew.
        """
        named = None
        if self.rank == 0:
            paths = sorted(self.path.glob("step-*.json"))
            later = [path for path in paths if is_later(path.name, step)]
            kept = [path for path in paths if path not in later][-self._keep :]
            for path in {*paths, *self.path.glob("step-*.json.tmp")} - {*kept}:
                self._unlink(path)
            contents = [manifest.read(path)[0] for path in kept]
            if all(contents):  # else the parts of one that only cannot be read now would go
                named = {name for m in contents for name in m["parts"] | m["best"]}
        named = self._comm.broadcast_object(named)
        if named is None:
            return
        for path in self.path.glob("step-*.pt*"):
            if path.name not in named and may_remove(path.name, self.rank, self._comm.world_size):
                self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it takes room, no more
            print(f"rank {self.rank}: {path} cannot be removed ({error.strerror})", flush=True)


def readable(content: dict[str, Any], part: str) -> dict[str, Any]:
    """Return a part of a checkpoint in the form in which it will be read; see engine.plain.

    Raises: CheckpointError if it holds a value that could not be read.
    """
    try:
        return plain(content, part)
    except TypeError as error:
        raise CheckpointError(f"no checkpoint of this run can be written: {error}") from error
