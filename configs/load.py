"""Turn config files and overrides from the command line into one checked description of a run.

Also makes the flat form of a configuration, which is printed, compared between ranks and stored in
checkpoints. Config files are Python and are executed: use only files that you trust.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy
import torch

from configs import modules
from configs.checks import check_node
from configs.errors import ConfigError
from configs.schema import Run, default_run

_PREFIX = "configs"
# Settings that do not change a run's numbers; a resumed run may have other values of them.
_HARMLESS = (
    "configs.data.num_workers_per_rank", "configs.dataset.root", "configs.checkpoint.",
    "configs.report.",
)  # fmt: skip
# Settings that older checkpoints lack, with the value by which the runs of that time behave. Where
# that value is None, the setting need not be listed.
_IF_ABSENT = {
    "configs.train.precision": "float32",
    "configs.dgc.residual_dtype": "float32",
    "configs.dgc.velocity_dtype": "float32",
    "configs.dgc.select_by": "raw",
    "configs.dgc.update_scale": 1.0,
    "configs.dgc.share_statistics": 0.0,
    "configs.dgc.clip_scope": "global",
}


def compose(files: Sequence[str | Path], overrides: Mapping[str, str]) -> fdl.Config[Run]:
    """Apply config files left to right, then overrides, to `default_run()`; check names and types.

    `configure` of a folder's `__init__.py` is applied once, before that of the folder's first file.
    Args:   overrides: dotted path below `configs` -> text of the value. The text is read as a
                Python literal or as true, false or none; any other text stands for itself.
    Raises: ConfigError.
    """
    modules.forget_labels()
    run = default_run()
    applied: set[Path] = set()
    for file in files:
        for path in _with_folders(Path(os.path.expanduser(file))):
            if path not in applied:
                applied.add(path)
                _apply(path, run)
    for path, text in overrides.items():
        _override(run, path, _parse(text))
    for path, node in _buildables(run):
        for name, value in node.__arguments__.items():
            node.__arguments__[name] = _plain(value)
        check_node(path, node)
    return run


def build(run: fdl.Config[Run]) -> Run:
    """Build the description, inner parts first; what a part refuses becomes a ConfigError."""
    built: dict[int, Any] = {}
    for path, node in reversed(list(_buildables(run))):
        if isinstance(node, fdl.Partial):
            continue
        try:
            built[id(node)] = fdl.build(node)
        except Exception as error:
            reason = str(error).split("\n\nFiddle context")[0]
            separator = "." if reason.split(" ")[0] in _parameter_names(node) else ": "
            raise ConfigError(f"{path}{separator}{reason}") from error
    return built[id(run)]


def flatten(run: fdl.Config[Run]) -> dict[str, Any]:
    """Return dotted path -> plain value for every setting, including defaults.

    Callables become their names. Two configurations are equal exactly if their flat forms are.
    """
    return {
        path: value if isinstance(value, (bool, int, float, str, type(None))) else _text(value)
        for path, value in _leaves(run, _PREFIX)
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each changed setting that would change the numbers of a resumed run.

    A setting that is absent and one that is None are the same here.
    """

    def matters(flat: Mapping[str, Any]) -> dict[str, Any]:
        return {
            path: value
            for path, value in (_IF_ABSENT | dict(flat)).items()
            if value is not None and not path.startswith(_HARMLESS)
        }

    return differences(matters(then), matters(now))


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting in which two flat forms differ."""
    absent = "(absent)"
    return [
        f"{path}: {mine.get(path, absent)!r} against {theirs.get(path, absent)!r}"
        for path in sorted(mine.keys() | theirs.keys())
        if mine.get(path, absent) != theirs.get(path, absent)
    ]


def run_name(files: Sequence[str | Path], suffix: str = "") -> str:
    """Name the folder of a run after its config files and suffix.

    Example: configs/cifar/resnet20.py configs/dgc/wm5.py -> cifar.resnet20+dgc.wm5
    """
    names = []
    for file in files:
        path = Path(file).with_suffix("")
        parts = (
            path.parts[path.parts.index(_PREFIX) + 1 :] if _PREFIX in path.parts else [path.name]
        )
        names.append(".".join(parts))
    return "+".join(names) + suffix


def _with_folders(file: Path) -> list[Path]:
    """Return the `__init__.py` of each package that a file lies in, outermost first, then the file.

    For a folder: only the `__init__.py` files, its own last.
    """
    if file.is_dir():
        file = file / "__init__.py"
    if not file.is_file():
        ours = Path(__file__).parent
        near = _nearest(str(file), [str(p.relative_to(ours.parent)) for p in ours.rglob("*.py")])
        raise ConfigError(f"there is no config file {file}{near}")
    file = file.resolve()
    folders = [folder / "__init__.py" for folder in modules.package_folders(file)]
    return [*folders, *([] if file.name == "__init__.py" else [file])]


def _apply(path: Path, run: fdl.Config[Run]) -> None:
    configure = getattr(modules.import_file(path), "configure", None)
    if configure is None:
        if path.name == "__init__.py":
            return
        raise ConfigError(f"{path} defines no function configure(run)")
    try:
        configure(run)
    except AttributeError as error:  # Fiddle's message names the unknown or unset parameter
        unknown = re.search(r"No parameter named '(\w+)'", str(error))
        names = [name for _, node in _buildables(run) for name in _parameter_names(node)]
        near = _nearest(unknown[1], names) if unknown else ""
        if unset := re.search(r"No parameter '(\w+)' has been set", str(error)):
            raise ConfigError(
                f"{path} changes {unset[1]!r}, which no file before it sets; list it after the "
                f"file of a model that has it"
            ) from error
        raise ConfigError(f"{path}: {error}{near}") from error


def _override(run: fdl.Config[Run], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    node: Any = run
    for depth, part in enumerate([*parents, name]):
        here = ".".join([_PREFIX, *parents[:depth]])
        if not isinstance(node, fdl.Buildable):
            raise ConfigError(f"{here} is {_text(node)} and has no setting {part!r}{_remedy(here)}")
        names = _parameter_names(node)
        if part not in names:
            raise ConfigError(
                f"{here} has no setting {part!r}{_nearest(part, names)}; it has: {', '.join(names)}"
            )
        if depth < len(parents):
            node = getattr(node, part, None)
    if isinstance(getattr(node, name, None), fdl.Buildable) and value is not None:
        inner = ", ".join(_parameter_names(getattr(node, name)))
        raise ConfigError(f"{_PREFIX}.{path} is a group of settings; set one of: {inner}")
    setattr(node, name, value)


def _remedy(path: str) -> str:
    return "; list a file of configs/dgc/ to set one" if path == f"{_PREFIX}.dgc" else ""


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _plain(value: Any) -> Any:
    """Return a setting in which numpy scalars are replaced by the Python values that they equal."""
    if isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return {_plain(k): _plain(v) for k, v in value.items()} if type(value) is dict else value


def _buildables(node: Any, path: str = _PREFIX) -> Iterator[tuple[str, fdl.Buildable]]:
    """Yield every callable of the tree with its path, outer before inner."""
    if isinstance(node, fdl.Buildable):
        yield path, node
        for name, value in node.__arguments__.items():
            yield from _buildables(value, f"{path}.{name}")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _buildables(value, f"{path}[{index}]")


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, fdl.Buildable):
        yield path, _text(fdl.get_callable(node))
        for name, value in fdl.ordered_arguments(node, include_defaults=True).items():
            yield from _leaves(value, f"{path}.{name}")
    elif isinstance(node, (list, tuple)) and any(isinstance(v, fdl.Buildable) for v in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, node


def _text(value: Any) -> str:
    """Return a text for a value; it is the same in every process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{modules.label(value.__module__)}.{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, (torch.Tensor, numpy.ndarray)):  # repr would round, and omit elements
        items = repr(value.tolist())
        if len(items) > 200:
            items = f"SHA-256 {hashlib.sha256(items.encode()).hexdigest()[:16]}"
        text = f"{value.dtype}({items})"
    else:
        text = repr(value)
    if " at 0x" in text:
        raise ConfigError(
            f"{text} cannot be compared between ranks or with a checkpoint; name it by a function, "
            f"or build it with fdl.Config"
        )
    return text


def _parameter_names(node: fdl.Buildable) -> list[str]:
    parameters = inspect.signature(fdl.get_callable(node)).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [*named, *(name for name in node.__arguments__ if name not in named)]


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
