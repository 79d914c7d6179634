"""Check the arguments of one callable of a configuration: their types, and that none is missing."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import fiddle as fdl
import typeguard

from configs.errors import ConfigError


def check_node(path: str, node: fdl.Buildable) -> None:
    """Check that each argument has its annotated type, and that required ones are set.

    Args: path: of the callable, for messages. The required arguments of a fdl.Partial may be
        missing: they are given when it is called.
    """
    target = fdl.get_callable(node)
    hints = _type_hints(target)
    for name, value in node.__arguments__.items():
        if not isinstance(value, fdl.Buildable) and name in hints:
            _check_type(f"{path}.{name}", value, hints[name])
    if isinstance(node, fdl.Partial):
        return
    for name, parameter in inspect.signature(target).parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        unset = name not in node.__arguments__
        if parameter.default is inspect.Parameter.empty and unset and not variadic:
            raise ConfigError(
                f"{path}.{name} is not set ({_annotation_text(hints.get(name, Any))}); "
                f"list a config file that sets it, such as configs/digits/resnet20.py"
            )


def _check_type(path: str, value: Any, hint: Any) -> None:
    try:
        if isinstance(value, bool) and hint in (int, float):
            raise typeguard.TypeCheckError("is a bool")
        typeguard.check_type(value, hint)
    except typeguard.TypeCheckError as error:
        raise ConfigError(
            f"{path} is {value!r} ({type(value).__name__}); allowed: {_annotation_text(hint)}"
        ) from error


def _type_hints(target: Any) -> dict[str, Any]:
    """Return the types of a callable's parameters; {} if its annotations cannot be read."""
    function = target.__init__ if isinstance(target, type) else target
    if isinstance(function, types.WrapperDescriptorType):
        return {}
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _annotation_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
