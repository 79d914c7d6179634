"""Fill in arguments that a callable takes and that the config has not set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def fill_in(make: Callable[..., Any], offered: Mapping[str, Any]) -> Callable[..., Any]:
    """Return `make` with every offered argument that it takes and has not been given yet."""
    names = asked(make)
    return functools.partial(make, **{name: v for name, v in offered.items() if name in names})


def asked(make: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that `make` takes and has not been given yet."""
    parameters = inspect.signature(getattr(make, "func", make)).parameters
    return parameters.keys() - getattr(make, "keywords", {}).keys()
