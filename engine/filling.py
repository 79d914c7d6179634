"""Arguments that a callable asks for by name, and that nobody has set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def fill_in(make: Callable[..., Any], offered: Mapping[str, Any]) -> Callable[..., Any]:
    """Return `make` with those of the offered arguments that it takes and that it was not given."""
    given = getattr(make, "keywords", {})
    asked = inspect.signature(getattr(make, "func", make)).parameters
    return functools.partial(
        make, **{name: v for name, v in offered.items() if name in asked and name not in given}
    )
