"""torch.save and torch.load that compute the SHA-256 of the file in the same pass over its bytes.

A second thread hashes while the first writes or reads, and nothing is copied for it. The thread is
worth having because SHA-256 reaches only 1.7 GiB/s on a core that has instructions for it, which is
less than some disks.
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

_PIECE_BYTES = 2**18  # smaller pieces are gathered: handing them to the thread would cost more
_LARGEST_GAP_BYTES = 2**16  # torch leaves some hundred bytes between two tensors of a file


def save(content: Any, file: BinaryIO) -> str:
    """Write content as torch.save does; return the SHA-256 of the bytes written, in hex digits.

    Raises: OSError, as the file raised it, where torch.save tells only that something has failed.
    """
    with closing(_HashedWriter(content, file)) as hashed:
        try:
            torch.save(content, hashed)
        except Exception as error:
            raise (hashed.error or error) from None
        return hashed.hash.hexdigest()


def load(path: Path) -> tuple[Any, Exception | None, str]:
    """Read a file that `save` wrote, with torch.load(weights_only=True), tensors to the CPU.

    Returns: (content, None, hash), or (None, the exception of torch.load, hash); the hash is the
        SHA-256 of the whole file.
    """
    with closing(_HashedReader(path)) as hashed:
        try:
            content, error = torch.load(hashed, map_location="cpu", weights_only=True), None
        except Exception as raised:  # a damaged file makes torch.load raise many kinds
            content, error = None, raised
        return content, error, hashed.hexdigest()


class _Hash:
    """SHA-256 of pieces in the order in which they are added, computed on a thread of its own."""

    def __init__(self) -> None:
        self._sha256, self._thread = hashlib.sha256(), ThreadPoolExecutor(1)
        self._small, self._last = bytearray(), None

    def add(self, piece: memoryview) -> None:
        """Hash a piece; the caller must not change its memory until `wait` has returned."""
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
    """The file that torch.save writes to (it never seeks).

    Pieces that lie in the content's own CPU tensors stay unchanged until everything is written, so
    the hash may lag behind the writing. Other pieces (copies of tensors on a device, the directory
    of the zip file) are freed after `write`, so `write` waits until they are hashed.
    """

    def __init__(self, content: Any, file: BinaryIO) -> None:
        self._file, self.hash = file, _Hash()
        self.error: OSError | None = None
        self._kept = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves(content)
            if torch.is_tensor(leaf) and leaf.layout is torch.strided and leaf.device.type == "cpu"
        }

    def write(self, data: memoryview) -> int:
        self.hash.add(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            if numpy.frombuffer(data, numpy.uint8).ctypes.data not in self._kept:
                self.hash.wait()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.hash.close()


class _HashedReader(io.RawIOBase):
    """The file that torch.load reads from: first the file's end, then one tensor after another.

    A piece is hashed while it is read if it continues where the hash has arrived. `hexdigest` then
    reads what has not been hashed yet.
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

    def _take(self, piece: memoryview, offset: int) -> None:
        """Hash the unhashed part of a piece at an offset of the file, and a small gap before it."""
        ahead = offset - self._num_hashed
        if ahead > _LARGEST_GAP_BYTES or ahead + len(piece) <= 0:
            return
        if ahead > 0:
            self._hash.add(memoryview(os.pread(self._file.fileno(), ahead, self._num_hashed)))
        self._hash.add(piece[max(0, -ahead) :])
        self._num_hashed = offset + len(piece)
