"""Download published archives, and keep their files only if all are complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

_TIMEOUT_S = 30
_HEADERS = {"User-Agent": "Mozilla/5.0 (parsimony)"}  # some hosts refuse the default of urllib


def fetch_zip(addresses: Sequence[str], folder: Path, sha1: Mapping[str, str]) -> None:
    """Put the files named in `sha1` into `folder`, from the first address that has them.

    A file appears in the folder only when it is complete. Other files there are not touched.
    Args:   sha1: file name, without folders -> SHA-1 of its bytes.
    Raises: OSError if no address gives an archive with these files and hashes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        for address in addresses:
            try:
                _unpack(_fetch(address, Path(scratch)), Path(scratch), sha1)
            except (OSError, EOFError, HTTPException, zipfile.BadZipFile, zlib.error) as error:
                failures.append(f"{address}: {error}")
                continue
            for name in sha1:
                os.replace(Path(scratch) / name, folder / name)
            return
    with contextlib.suppress(OSError):  # it is not empty: it was there before
        folder.rmdir()
    raise OSError("; ".join(failures))


def _fetch(address: str, scratch: Path) -> Path:
    archive = scratch / "archive.zip"
    request = urllib.request.Request(address, headers=_HEADERS)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as source, open(archive, "wb") as file:
        shutil.copyfileobj(source, file)
    return archive


def _unpack(archive: Path, scratch: Path, sha1: Mapping[str, str]) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = {Path(member).name: member for member in opened.namelist()}
        for name, expected in sha1.items():
            if name not in members:
                raise OSError(f"the archive has no {name}")
            with opened.open(members[name]) as source, open(scratch / name, "wb") as file:
                shutil.copyfileobj(source, file)
            with open(scratch / name, "rb") as file:
                found = hashlib.file_digest(file, "sha1").hexdigest()
            if found != expected:
                raise OSError(f"{name} has SHA-1 {found}, not the published {expected}")
