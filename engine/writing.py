"""Files that are written whole or not at all, beside training if asked, and what to say if not."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

from engine import hashed_files
from engine.copies import on_host
from engine.manifest import CheckpointError


class WriteError(CheckpointError):
    """Files of a run cannot be written; the message says where, by whom, and what is free."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """Replace a file so that, whenever the machine stops, either the old or the new one is there.

    Args:    write: writes the new content to the open file that it is given.
    Returns: what `write` returned.
    """
    result = _write_temporary(path, write)
    _publish(path)
    return result


def cannot_write(folder: Path, error: OSError) -> str:
    """Say that a folder cannot be written, in the system's words, and what is free there."""
    text = f"{folder} cannot be written by {socket.gethostname()} ({error.strerror or error}"
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        free, total = (n * disk.f_frsize / 2**20 for n in (disk.f_bavail, disk.f_blocks))
        text += f"; {free:.1f} of {total:.1f} MiB are free, and {disk.f_favail} more files"
        text += ", read-only" if disk.f_flag & os.ST_RDONLY else ""
    return f"{text})"


class Writing:
    """The parts of a checkpoint that a rank writes, under temporary names until `publish`."""

    def __init__(self, folder: Path, contents: dict[str, Any], *, beside: bool) -> None:
        """Write them; with `beside`, on a thread, from copies that are made now."""
        self._paths = [folder / name for name in contents]
        self._written: dict[str, Any] = {}
        self._error: Exception | None = None
        self._is_published = False
        self._thread: Thread | None = None
        if not beside:
            self._write(contents)
            return
        copies = {name: on_host(content) for name, content in contents.items()}
        self._thread = Thread(target=self._write, args=(copies,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, contents: dict[str, Any]) -> None:
        try:
            for path, content in zip(self._paths, contents.values(), strict=True):
                sha256, size = _write_temporary(path, lambda file, c=content: _save(c, file))
                self._written[path.name] = {"bytes": size, "sha256": sha256}
        except Exception as error:  # raised by `wait`, perhaps on another thread
            self._error = error

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> dict[str, Any]:
        """Return size and SHA-256 of each file. Raises: OSError if one could not be written."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._written

    def publish(self) -> dict[str, Any]:
        """Give the files their names."""
        self._is_published = True
        for path in self._paths:
            _publish(path)
        return {}

    def remove(self) -> None:
        """Remove the files, of a checkpoint that will not become whole."""
        for path in self._paths:
            for file in [_temporary(path)] + [path] * self._is_published:
                with contextlib.suppress(OSError):
                    file.unlink()


def _save(content: Any, file: BinaryIO) -> tuple[str, int]:
    sha256 = hashed_files.save(content, file)
    return sha256, file.tell()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _write_temporary(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())  # a disk across the network may report only here, or in close
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return result


def _publish(path: Path) -> None:
    _temporary(path).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
