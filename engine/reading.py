"""Reading a folder of checkpoints: its manifests, and parts, which must be what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import hashed_files, manifest
from engine.manifest import CheckpointError


def read_part(folder: Path, name: str, part: dict[str, Any]) -> dict[str, Any]:
    """Read one part; its size and checksum must be those that the manifest gives.

    Raises: CheckpointError
    """
    path = folder / name
    try:
        _check_file(path, part)
        content, error, sha256 = hashed_files.load(path)
    except OSError as broken:  # the disk fails
        raise CheckpointError(f"{path} cannot be read ({broken})") from broken
    if sha256 != part["sha256"]:
        raise CheckpointError(f"{path} is not what was written: its SHA-256 differs")
    if error is not None:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    return content


def _check_file(path: Path, part: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    if path.resolve().parent != path.parent.resolve():
        raise CheckpointError(f"{path} is a link that leads out of the folder; copy the file")
    size = path.stat().st_size
    if size != part["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, not {part['bytes']}")


def manifests(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests that can be read, newest first; print which ones cannot.

    Raises: CheckpointError if a later version of Parsimony wrote one.
    """
    found = []
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        content, problem = manifest.read(path)
        if content is None:
            print(f"skipped a damaged checkpoint: {problem}", flush=True)
        else:
            found.append(content)
    return found


def candidates(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests that can be read. Raises: CheckpointError if all are damaged."""
    found = manifests(folder)
    if not found and any(folder.glob("step-*.json")):
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: all manifests, step-*.json, are damaged. Put "
            f"the files back, or delete the folder to start anew"
        )
    return found
