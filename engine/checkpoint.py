"""Checkpoints: one shared part written by rank 0, one part a rank, a manifest that names them all.

    checkpoints/step-00000440.shared.pt            model, optimizer, schedule, position
    checkpoints/step-00000440.rank-0001-of-0002.pt residuals, velocities, buffers, random states
    checkpoints/step-00000440.json                 names, sizes and SHA-256 of the above, and of
                                                   the shared part of the best step so far

Every file is written under a temporary name, hashed while it is written, flushed to disk and then
renamed. The manifest comes last, so a checkpoint is either complete or does not exist. Writing or
reading a part neither copies its tensors nor passes over the file twice. Parts hold tensors and
plain values only, so that `torch.load(weights_only=True)` reads them; a value that it would refuse
is refused before any file is written. Each rank writes its own part on the host where it runs, and
reads it there if the job has as many ranks again. If it has more or fewer, each part is read by a
rank that finds it on its disk. So hosts need not share a disk, as long as none of those that wrote
is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine import hashed_files
from engine.interfaces import Collectives
from engine.parts import assign, may_remove, part_name, step_name
from engine.plain import plain

_MANIFEST_KEYS = {"step", "world_size", "parts", "best"}


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which one, why, and what to do."""


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
                yield old_rank, self._folder.read(name, self._manifest["parts"][name])


class CheckpointFolder:
    """The checkpoints of one run, as one rank sees them.

    All methods except `read` are collectives: every rank must call them.
    """

    def __init__(self, folder: Path, comm: Collectives, keep: int = 2) -> None:
        self._folder, self._comm, self._keep = folder, comm, keep
        self.rank = comm.rank
        self._best: dict[str, Any] = {}  # file name -> size and checksum of the best shared part
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self, step: int, shared: dict[str, Any], worker: dict[str, Any], *, is_best: bool
    ) -> None:
        """Write a checkpoint of `step`, then delete all but the newest `keep` and the best one.

        Raises: CheckpointError, before any file changes, if a value could not be read back.
        """
        shared, worker = readable(shared, "shared"), readable(worker, "worker")
        rank, world_size = self._comm.rank, self._comm.world_size
        mine = {part_name(step, rank, world_size): worker}
        if rank == 0:
            mine[f"{step_name(step)}.shared.pt"] = shared
        written = {file: self._write_part(file, content) for file, content in mine.items()}
        parts: dict[str, Any] = {}
        for files in self._comm.all_gather_object(written):  # answered only when all have written
            parts.update(files)
        if is_best:
            self._best = {f: part for f, part in parts.items() if f.endswith(".shared.pt")}
        if rank == 0:
            content = {"step": step, "world_size": world_size, "parts": parts, "best": self._best}
            text = json.dumps(content, indent=2).encode()
            path = self._folder / f"{step_name(step)}.json"
            write_atomically(path, lambda file: file.write(text))
        self._comm.barrier()
        self._remove_old()

    def load_latest(self) -> Loaded | None:
        """Return the newest checkpoint that is complete, whatever number of ranks wrote it.

        Rank 0 names the candidates, newest first, and the first one of which every part is read
        without fault is taken. Rank 0 then sends its shared part tensor by tensor, so that a rank
        needs little memory beyond the result: 64 MiB, or as much as the values that are no tensors.
        Returns: None if the folder has no checkpoint.
        Raises: CheckpointError if there are checkpoints and none of them can be read.
        """
        manifests = self._comm.broadcast_object(self._list_manifests())
        complaints = []
        for manifest in manifests:
            readers = self._readers(manifest)
            contents, problem = self._try(manifest, readers)
            problems = [p for p in self._comm.all_gather_object(problem) if p]
            if not problems:
                shared = dict(self._comm.broadcast_object(contents[0]))
                self._best = manifest["best"]
                for complaint in complaints if self._comm.rank == 0 else []:
                    print(f"skipped a damaged checkpoint: {complaint}", flush=True)
                return Loaded(self, manifest, shared, contents[1], readers)
            complaints += problems
            del contents
        if complaints:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be read: {'; '.join(complaints)}. "
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
        mine = [(self._folder / name).is_file() for name in names]
        return assign(self._comm.all_gather_object(mine))

    def load_best(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the shared part of rank 0's best checkpoint, except for the keys in `without`."""
        result: Any = None
        if self._comm.rank == 0:
            try:
                best = [m["best"] for m in self._list_manifests() if m["best"]]
                if not best:
                    raise CheckpointError(f"{self._folder} holds none")
                ((name, part),) = best[0].items()
                result = self.read(name, part)
                result = {key: value for key, value in result.items() if key not in without}
            except CheckpointError as error:
                result = CheckpointError(f"no best checkpoint to evaluate: {error}. Train first")
        result = self._comm.broadcast_object(result)
        if isinstance(result, CheckpointError):
            raise result
        return result

    def read(self, name: str, part: dict[str, Any]) -> dict[str, Any]:
        """Read one part; its size and checksum must be those that the manifest gives."""
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is not there")
        size = path.stat().st_size
        if size != part["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, not {part['bytes']}")
        try:
            content, error, sha256 = hashed_files.load(path)
        except OSError as broken:  # the disk fails
            raise CheckpointError(f"{path} cannot be read ({broken})") from broken
        if sha256 != part["sha256"]:
            raise CheckpointError(f"{path} is not what was written: its SHA-256 differs")
        if error is not None:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} cannot be read ({reason})") from error
        return content

    def _try(self, manifest: dict[str, Any], readers: list[int]) -> tuple[list[Any], str | None]:
        """Read the parts that are this rank's to read, of which it keeps no more than its own.

        Returns: the shared part (on rank 0), this rank's own, if it has one, and what is wrong.
        """
        step, written_by, rank = manifest["step"], manifest["world_size"], self._comm.rank
        contents: list[Any] = [None, None]
        try:
            if rank == 0:
                name = f"{step_name(step)}.shared.pt"
                contents[0] = self.read(name, manifest["parts"][name])
            for old_rank in (old for old, reader in enumerate(readers) if reader == rank):
                name = part_name(step, old_rank, written_by)
                content = self.read(name, manifest["parts"][name])
                if written_by == self._comm.world_size:
                    contents[1] = content
                del content
        except CheckpointError as error:
            return [None, None], f"rank {rank}: {error}"
        return contents, None

    def _list_manifests(self) -> list[dict[str, Any]]:
        """Return the manifests that can be read, newest first; print which ones cannot."""
        manifests = []
        for path in sorted(self._folder.glob("step-*.json"), reverse=True):
            try:
                manifest = json.loads(path.read_text())
                if not isinstance(manifest, dict) or not _MANIFEST_KEYS <= manifest.keys():
                    raise ValueError(f"allowed: an object with {', '.join(sorted(_MANIFEST_KEYS))}")
                manifests.append(manifest)
            except (OSError, ValueError) as error:
                print(f"skipped a damaged checkpoint: {path}: {error}", flush=True)
        return manifests

    def _write_part(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        path = self._folder / name
        sha256 = write_atomically(path, lambda file: hashed_files.save(content, file))
        return {"bytes": path.stat().st_size, "sha256": sha256}

    def _remove_old(self) -> None:
        """Delete old manifests (rank 0), then this rank's files that no manifest names any more."""
        if self._comm.rank == 0:
            for path in sorted(self._folder.glob("step-*.json"))[: -self._keep]:
                path.unlink()
        named = self._comm.broadcast_object(self._named_parts() if self._comm.rank == 0 else None)
        rank, world_size = self._comm.rank, self._comm.world_size
        for path in self._folder.glob("step-*.pt*"):
            if path.name not in named and may_remove(path.name, rank, world_size):
                path.unlink(missing_ok=True)

    def _named_parts(self) -> set[str]:
        return {
            name
            for manifest in self._list_manifests()
            for name in manifest["parts"] | manifest["best"]
        }


def readable(content: dict[str, Any], part: str) -> dict[str, Any]:
    """Return a part of a checkpoint in the form in which it will be read; see engine.plain.

    Raises: CheckpointError if it holds a value that could not be read.
    """
    try:
        return plain(content, part)
    except TypeError as error:
        raise CheckpointError(f"no checkpoint of this run can be written: {error}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """Replace a file so that, whenever the machine stops, either the old or the new one is there.

    Args:    write: writes the new content to the open file that it is given.
    Returns: what `write` returned.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        result = write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return result
