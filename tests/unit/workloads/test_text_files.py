"""Which files are read as text, from where on, and what is said of the others."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy
import pytest
import torch

from workloads.text import text_folder
from workloads.text_files import is_plain, open_text

TEXT = "the caf\u00e9\n = a title = \r\n\n the end".encode()
MARK = b"\xef\xbb\xbf"
SAME = {
    "plain": TEXT,
    "marked": MARK + TEXT,
    "gzip": gzip.compress(TEXT),
    "gzip of marked": gzip.compress(MARK + TEXT),
    "gzip in members": gzip.compress(TEXT[:7]) + gzip.compress(TEXT[7:]),
}


def archive(make, name="a.txt"):
    file = io.BytesIO()
    make(file, name)
    return file.getvalue()


def zipped(file, name):
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(name, TEXT)


def tarred(file, name):
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo(name))


def database():
    with sqlite3.connect(":memory:") as opened:
        opened.execute("create table texts (line)")
        return opened.serialize()


OTHERS = {
    "UTF-16": TEXT.decode().encode("utf-16"),
    "UTF-32": TEXT.decode().encode("utf-32"),
    "UTF-16 .*iconv -f UTF-16LE": TEXT.decode().encode("utf-16-le"),
    "zstd; first: zstd -d": bytes.fromhex("28b52ffd0458") + TEXT,
    "xz; first: xz -d": lzma.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "zip archive .*; first: unzip": archive(zipped),
    "zip archive": archive(lambda file, _: torch.save(torch.ones(2), file)),
    "tar archive": archive(tarred),
    "unpacked, is no plain text but a tar": gzip.compress(archive(tarred)),
    "gzip once more": gzip.compress(gzip.compress(TEXT)),
    "a pickle": pickle.dumps([TEXT]),
    "numpy array": archive(lambda file, _: numpy.save(file, numpy.ones(2))),
    "SQLite": database(),
    "Parquet": b"PAR1\x15\x04\x15" + TEXT,
    "Arrow": b"ARROW1\0\0" + TEXT,
    "HDF5": b"\x89HDF\r\n\x1a\n" + TEXT,
    "binary: it has a NUL at byte 3": b"abc\0" + TEXT,
    "CR alone; first: tr": b"a line\ranother\r",
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_positions_are_those_of_the_plain_text(tmp_path, content, buffer_bytes):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with open_text(path, buffer_bytes) as file:
        start = file.tell()
        assert file.seek(0, io.SEEK_END) - start == len(TEXT)
        for position in (0, 9, 3):
            file.seek(start + position)
            assert file.read() == TEXT[position:]
    assert is_plain(path) == (content is TEXT)


@pytest.mark.parametrize("complaint", OTHERS)
def test_what_is_no_text_is_named_with_the_remedy(tmp_path, complaint):
    path = tmp_path / "a b.txt"
    path.write_bytes(OTHERS[complaint])
    with pytest.raises(ValueError, match=rf"a b.txt.*{complaint}") as caught:
        open_text(path)
    assert "first: " in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"a\r\nb\r\n", b"a\rb\n", b"a\r" + b"b" * 20_000 + b"\n", "na\u00efve".encode("latin-1"),
     b"BZh\n", b"PK\n", b"PAR1 is a parish\n", b"a" * 9000 + b"\0\n"],
)  # fmt: skip
def test_odd_texts_are_texts(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with open_text(path) as file:
        assert file.read() == content


@pytest.mark.parametrize("cut", [slice(None, -5), slice(None, 300)])
def test_damaged_gzip_is_named(tmp_path, cut):
    lines = b"".join(b"%d\n" % number for number in range(10_000))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_bytes(gzip.compress(lines)[cut])
    with pytest.raises(ValueError, match=r"train.txt is damaged .*gzip -t"):
        text_folder(str(tmp_path))


def test_a_folder_of_packed_texts_is_read_as_the_plain_one(tmp_path):
    for name in ("plain", "packed", "both"):
        (tmp_path / name / "train").mkdir(parents=True)
    for split in ("train/1", "train/2", "test"):
        text = f"some words of {split}\n".encode() * 3
        for name in ("plain", "both"):
            (tmp_path / name / f"{split}.txt").write_bytes(text)
        for name in ("packed", "both"):
            (tmp_path / name / f"{split}.txt.gz").write_bytes(gzip.compress(text))
    plain, *others = [text_folder(str(tmp_path / name)) for name in ("plain", "packed", "both")]
    for other in others:
        for split in ("train", "test"):
            assert torch.equal(plain[split]._words, other[split]._words)
