"""Open text files, plain or compressed by gzip; recognise other files by their first bytes.

A text begins after its byte order mark, if it has one. Positions and sizes are those of the
unpacked text, so that a run has the same numbers whether a file is compressed or not.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shlex
import zlib
from pathlib import Path
from typing import Any, BinaryIO

Span = tuple[int, int]
"""The bytes from a first one up to, not including, a last one."""

_GZIP, _UTF8_MARK = b"\x1f\x8b\x08", b"\xef\xbb\xbf"
_HEAD_BYTES = 8192
_INSTEAD = " {0} > {0}.new && mv {0}.new {0}"
_EXPORT = "write its texts to a file, a line each"
# (first bytes, what such a file is, how to get text out of it)
_OTHERS = [
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32", f"iconv -f UTF-32 -t UTF-8{_INSTEAD}"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", f"iconv -f UTF-16 -t UTF-8{_INSTEAD}"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed by zstd", "zstd -d {0}"),
    (rb"\xfd7zXZ\0", "compressed by xz", "xz -d -k {0}"),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "compressed by bzip2", "bzip2 -d -k {0}"),
    (rb"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d {0}"),
    (rb"LZIP\x01", "compressed by lzip", "lzip -d -k {0}"),
    (rb"\x1f[\x9d\xa0]", "compressed by compress", "uncompress {0}"),
    (rb"\xff\x06\0\0sNaPpY", "compressed by snappy", "snzip -d {0}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {0}"),
    (rb"Rar!\x1a\x07", "a rar archive", "unrar x {0}"),
    (rb".{257}ustar", "a tar archive", "tar -xf {0}"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or torch.save, npz)", "unzip {0}"),
    (rb"\x1f\x8b", "compressed by gzip once more", "gzip -d {0}"),
    (rb"PAR[1E]\x15", "Parquet", f"{_EXPORT}: pandas.read_parquet"),
    (rb"ARROW1\0|FEA1|\xff\xff\xff\xff[^\xff]", "Arrow", f"{_EXPORT}: pyarrow.ipc, or datasets"),
    (rb"ORC[\x08-\x0a]", "ORC", f"{_EXPORT}: pandas.read_orc"),
    (rb"Obj\x01", "Avro", f"{_EXPORT}: fastavro"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5", f"{_EXPORT}: h5py"),
    (rb"SQLite format 3\0", "an SQLite database", f"{_EXPORT}: sqlite3"),
    (rb"\x80[\x02-\x05]", "a pickle", f"{_EXPORT}: pickle.load or torch.load, if you trust it"),
    (rb"\x93NUMPY", "a numpy array", f"{_EXPORT}: numpy.load"),
    (rb"%PDF-\d", "a PDF", "pdftotext {0}"),
]  # fmt: skip
_KINDS = [(re.compile(begin, re.DOTALL), what, remedy) for begin, what, remedy in _OTHERS]


def open_text(path: Path, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
    """Open a text file for reading and seeking, at the position where its text begins.

    Cost:   in a gzip file, seeking forward unpacks the bytes in between, and seeking back unpacks
                from the start.
    Raises: ValueError for a file that is no text, with what it is and the remedy. A damaged gzip
                file raises ValueError later, when the damaged bytes are read.
    """
    file: Any = open(path, "rb", buffering=max(buffer_bytes, _HEAD_BYTES))
    try:
        if file.read(len(_GZIP)) == _GZIP:
            file.close()
            file = io.BufferedReader(_Gzip(path), max(buffer_bytes, _HEAD_BYTES))
        file.seek(0)
        head = file.read(_HEAD_BYTES)
        _check(path, head, file)
        file.seek(len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0)
    except BaseException:
        file.close()
        raise
    return file


def is_plain(path: Path) -> bool:
    """Tell whether the bytes of the file are those of the text: no gzip, no byte order mark."""
    with open(path, "rb") as file:
        return not file.read(len(_GZIP)).startswith((_GZIP, _UTF8_MARK))


def line_spans(path: Path, num_parts: int, begin: int = 0, end: int | None = None) -> list[Span]:
    """Divide a text, or the span of it from `begin` to `end`, into parts of nearly equal size.

    Parts begin where lines do, as `begin` must. Returns: their spans.
    """
    bounds = [begin]
    with open_text(path) as file:
        start = file.tell()
        end = file.seek(0, os.SEEK_END) - start if end is None else end
        for part in range(1, num_parts):
            wanted = begin + (end - begin) * part // num_parts
            if wanted > bounds[-1]:
                file.seek(start + wanted - 1)
                file.readline()
                bounds.append(file.tell() - start)
            else:  # inside the line that ends the part before
                bounds.append(bounds[-1])
    return list(zip(bounds, [*bounds[1:], end], strict=True))


def _check(path: Path, head: bytes, file: BinaryIO) -> None:
    fault = next(((what, to_do) for begin, what, to_do in _KINDS if begin.match(head)), None)
    if fault is None and b"\0" in head:
        what = f"binary: it has a NUL at byte {head.index(0)} (text in UTF-16 has them too)"
        fault = what, f"iconv -f UTF-16LE -t UTF-8{_INSTEAD}"
    if fault is None and b"\r" in head and not _has_newline(head, file):
        fault = "one line, as its lines end in CR alone", f"tr '\\r' '\\n' <{_INSTEAD}"
    if fault is not None:
        where = f"{path}, unpacked," if isinstance(file.raw, gzip.GzipFile) else f"{path}"
        remedy = fault[1].format(shlex.quote(str(path)))
        raise ValueError(f"{where} is no plain text but {fault[0]}; first: {remedy}")


def _has_newline(piece: bytes, file: BinaryIO) -> bool:
    while piece and b"\n" not in piece:
        piece = file.read(2**20)
    return bool(piece)


class _Gzip(gzip.GzipFile):
    """A gzip file whose errors name the file and a remedy."""

    def read(self, size: int | None = -1) -> bytes:
        return self._with_name(super().read, size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._with_name(super().seek, offset, whence)

    def _with_name(self, do: Any, *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self.name} is damaged ({error}); fetch it again, then gzip -t tells"
            ) from error
