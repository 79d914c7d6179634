"""Compiled code is loaded only from files that nobody else than this user, or root, could write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_REMEDY = "Set XDG_CACHE_HOME to a folder of your own, as on a shared disk each user should"


def private_folder(folder: Path) -> Path:
    """Make a folder for this user alone, if it is not there, and return it.

    One that is this user's, but that others may write, is closed to them.
    Raises: RuntimeError for a folder, or a link in its place, of another user than this and root.
        OSError if it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid not in _trusted_users() or not stat.S_ISDIR(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no folder but a link or file"
        raise RuntimeError(
            f"{folder} is {kind} of user {found.st_uid}, not of yours ({os.getuid()}): code in it "
            f"could be anybody's. {_REMEDY}"
        )
    if found.st_mode & _OTHERS_MAY_WRITE and found.st_uid == os.getuid():
        folder.chmod(0o700)
    return folder


def is_ours(path: Path) -> bool:
    """Tell whether a file is there that only this user, or root, could have written."""
    try:
        found = path.lstat()
    except OSError:
        return False
    is_closed = not found.st_mode & _OTHERS_MAY_WRITE
    return stat.S_ISREG(found.st_mode) and is_closed and found.st_uid in _trusted_users()


def _trusted_users() -> tuple[int, int]:
    return os.getuid(), 0
