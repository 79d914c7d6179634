"""How a test says which of its cases are campaigns, run by launch/test.sh --long only."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def long(*values: Any, id: str | None = None) -> Any:
    """Return one case of a parametrised test as a campaign."""
    return pytest.param(*values, marks=pytest.mark.long, id=id)


def all_but_long(short: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases, those that are not among `short` as campaigns."""
    return [case if case in short else long(case) for case in cases]

