"""The C++ and CUDA files, found by what they include."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_INCLUDE = re.compile(r'^#include "(.*)"\n', re.MULTILINE)


def joined(name: str) -> str:
    """Return a source of the package as one text: each file it includes, once, in its place."""
    seen: set[str] = set()

    def content(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (PACKAGE / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: content(found[1]), text)

    return content(name)
