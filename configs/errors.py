"""ConfigError, and how an error of a part becomes one that names the setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ConfigError(Exception):
    """A configuration cannot be run; the message names the setting and what is allowed."""


def build_part(path: str, make: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Call what a setting names; turn what the callable refuses into a ConfigError.

    Args: path: of the setting, for the message, e.g. "configs.train.optimizer".
    """
    try:
        return make(*arguments, **settings)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{path}: {error}") from error
