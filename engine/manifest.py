"""The manifest of a checkpoint: its content, and what is checked before anything is believed of it.

    {"format": 2, "step": 440, "world_size": 2,
     "parts": {file name: {"bytes": ..., "sha256": ...}, ...},   a shared one, one a rank
     "best": {file name: {...}},                                 the best step's shared part, or {}
     "sha256": ...}                                              of all of the above

Format 1, until November 2026, had neither "format" nor "sha256".
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from engine.parts import part_name, shared_name, step_name

FORMAT = 2
_KEYS = {"step", "world_size", "parts", "best"}
_SHARED = re.compile(r"step-\d{8,}\.shared\.pt", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which one, why, and what to do."""


class _Damaged(ValueError):
    """What is wrong with a manifest."""


def to_bytes(step: int, world_size: int, parts: dict[str, Any], best: dict[str, Any]) -> bytes:
    content = {
        "format": FORMAT, "step": step, "world_size": world_size, "parts": parts, "best": best,
    }  # fmt: skip
    return json.dumps({**content, "sha256": _hash(content)}, indent=2).encode()


def read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a manifest and "", or None and what is wrong with it.

    Raises: CheckpointError if a later version of Parsimony wrote it.
    """
    try:
        if not path.is_file():
            raise _Damaged("it is no file")
        content = json.loads(path.read_bytes())
        _check(content, path)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path}: {' '.join(str(error).split())[:300]}"
    return content, ""


def _check(content: Any, path: Path) -> None:
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise _Damaged(f"allowed: an object with {', '.join(sorted(_KEYS))}")
    _check_format(content, path)
    step, world_size, parts = content["step"], content["world_size"], content["parts"]
    if not _is_count(step) or path.name != f"{step_name(step)}.json":
        raise _Damaged(f"its step is {step!a:.80}, which is not that of its name")
    is_counted = _is_count(world_size) and world_size > 0
    if not isinstance(parts, dict) or not is_counted or len(parts) != world_size + 1:
        raise _Damaged(f"it has not one part for each of {world_size!a:.80} ranks and a shared one")
    names = {shared_name(step), *(part_name(step, r, world_size) for r in range(world_size))}
    if strange := parts.keys() - names:
        raise _Damaged(
            f"it names a part {min(strange)!a:.80}; allowed: names of step {step}, "
            "of this folder, without a path"
        )
    _check_best(content["best"])
    for name, part in [*parts.items(), *content["best"].items()]:
        _check_part(name, part)


def _check_format(content: dict[str, Any], path: Path) -> None:
    """Check the format, and the manifest's own hash, if it has one."""
    given, number = content.get("sha256"), content.get("format", 1)
    if _is_count(number) and number > FORMAT:
        raise CheckpointError(
            f"{path} was written by a later version of Parsimony (format {number}; here {FORMAT}). "
            f"Go on with that version, or use --suffix to start another run"
        )
    if not _is_count(number) or number == 0 or (number == FORMAT and given is None):
        raise _Damaged(f"its format is {number!a:.80}, its own SHA-256 {given!a:.80}")
    if given is not None and given != _hash({k: v for k, v in content.items() if k != "sha256"}):
        raise _Damaged("it is not what was written: its own SHA-256 differs")


def _check_best(best: Any) -> None:
    if not isinstance(best, dict) or len(best) > 1:
        raise _Damaged(f"its best is {best!a:.80}; allowed: one shared part, or none")
    for name in best:
        if not _SHARED.fullmatch(name):
            raise _Damaged(f"its best is {name!a:.80}; allowed: step-<8 digits>.shared.pt")


def _check_part(name: str, part: Any) -> None:
    is_right = (
        isinstance(part, dict)
        and _is_count(part.get("bytes"))
        and isinstance(part.get("sha256"), str)
        and _SHA256.fullmatch(part["sha256"])
    )
    if not is_right:
        raise _Damaged(f"{name} is {part!a:.120}; allowed: bytes, and sha256 in 64 digits")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
