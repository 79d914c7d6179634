"""torch.save and torch.load that hash the file's bytes as these pass, each once.

Hashing goes on beside writing and reading, on a thread of its own, and copies nothing. SHA-256 does
1.7 GiB/s on a core that has instructions for it: less than some disks.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch.utils._pytree import tree_leaves

_PIECE_BYTES = 2**18  # is worth another thread
_LARGEST_GAP_BYTES = 2**16  # between two tensors of a file there are some hundred


def save(content: Any, file: BinaryIO) -> str:
    """Write content as torch.save does; return the SHA-256 of what was written, as hex digits."""
    with closing(_HashedWriter(content, file)) as hashed:
        torch.save(content, hashed)
        return hashed.hash.hexdigest()


def load(path: Path) -> tuple[Any, Exception | None, str]:
    """Read a file of `save`, tensors to the CPU, by torch.load(weights_only=True).

    Returns: the content, or None and what torch.load raised; the SHA-256 of the whole file.
    """
    with closing(_HashedReader(path)) as hashed:
        try:
            content, error = torch.load(hashed, map_location="cpu", weights_only=True), None
        except Exception as raised:  # of many kinds
            content, error = None, raised
        return content, error, hashed.hexdigest()


class _Hash:
    """SHA-256 of pieces in order, on a thread of its own."""

    def __init__(self) -> None:
        self._sha256, self._thread = hashlib.sha256(), ThreadPoolExecutor(1)
        self._small, self._last = bytearray(), None

    def add(self, piece: memoryview) -> None:
        """Hash a piece, which must stay as it is until `wait` has returned."""
        if piece.nbytes < _PIECE_BYTES:
            self._small += piece
        if len(self._small) >= _PIECE_BYTES or piece.nbytes >= _PIECE_BYTES:
            small, self._small = self._small, bytearray()
            self._last = self._thread.submit(self._sha256.update, small)
        if piece.nbytes >= _PIECE_BYTES:
            self._last = self._thread.submit(self._sha256.update, piece)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None

    def hexdigest(self) -> str:
        self.wait()
        self._sha256.update(self._small)
        self._small.clear()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._thread.shutdown()


class _HashedWriter:
    """What torch.save writes to; it never seeks.

    The hash may lag behind in what is the content's own memory, and so stays until all is written;
    copies of what is on a device, and the zip file's directory, do not.
    """

    def __init__(self, content: Any, file: BinaryIO) -> None:
        self._file, self.hash = file, _Hash()
        self._kept = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves(content)
            if torch.is_tensor(leaf) and leaf.layout is torch.strided and leaf.device.type == "cpu"
        }

    def write(self, data: memoryview) -> int:
        self.hash.add(data)
        try:
            return self._file.write(data)
        finally:
            if numpy.frombuffer(data, numpy.uint8).ctypes.data not in self._kept:
                self.hash.wait()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.hash.close()


class _HashedReader(io.RawIOBase):
    """What torch.load reads from: the file's end first, then one tensor after the other.

    What is read where the hash has come to is hashed; whatever is left then is read for that alone.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)
        self._hash, self._num_hashed = _Hash(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view, count = memoryview(buffer).cast("B"), 0
        try:
            while num_read := self._file.readinto(view[count : count + _PIECE_BYTES]):
                self._take(view[count : count + num_read], self.tell() - num_read)
                count += num_read
        finally:
            self._hash.wait()
        return count

    def hexdigest(self) -> str:
        piece = memoryview(bytearray(_PIECE_BYTES))
        self.seek(self._num_hashed)
        while self.readinto(piece):
            pass
        return self._hash.hexdigest()

    def close(self) -> None:
        self._hash.close()
        self._file.close()
        super().close()

    def _take(self, piece: memoryview, place: int) -> None:
        """Hash what of a piece of the file is next, and the few bytes before it."""
        ahead = place - self._num_hashed
        if ahead > _LARGEST_GAP_BYTES or ahead + len(piece) <= 0:
            return
        if ahead > 0:
            self._hash.add(memoryview(os.pread(self._file.fileno(), ahead, self._num_hashed)))
        self._hash.add(piece[max(0, -ahead) :])
        self._num_hashed = place + len(piece)
