"""Find the folder of a run, also one that earlier versions named after the number of its ranks."""

from __future__ import annotations

import re
from pathlib import Path

from engine.interfaces import Collectives
from engine.run_folder import RunFolderError


def find(runs: Path, name: str, suffix: str, comm: Collectives) -> tuple[Path, str]:
    """Return the folder of a run, as rank 0 finds it, and what to tell of it. A collective.

    It is `<name><suffix>`. If that is not there, but one `<name>.np<ranks><suffix>` is, it is that.
    Raises: RunFolderError, on every rank, if there are several of these.
    """
    folder = runs / f"{name}{suffix}"
    found = _earlier(folder.parent, name, suffix) if comm.rank == 0 and not folder.exists() else []
    found = comm.broadcast_object(found)
    if len(found) > 1:
        raise RunFolderError(
            f"there is no {folder}, and several that an earlier version named after their ranks: "
            f"{', '.join(found)}. Rename the one that you mean to {folder.name}, or start another "
            f"with --suffix"
        )
    if not found:
        return folder, ""
    return folder.parent / found[0], f"taking {found[0]}, as there is no {folder.name}"


def _earlier(runs: Path, name: str, suffix: str) -> list[str]:
    named = re.compile(re.escape(f"{name}.np") + r"\d+" + re.escape(suffix))
    return sorted(path.name for path in runs.glob("*") if named.fullmatch(path.name))
