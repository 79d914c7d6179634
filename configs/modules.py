"""Import config files as Python modules, also in the loader processes of a job.

A config file belongs to the package that its folders form: it begins at the outermost of the
folders above the file that have an `__init__.py` each, or at the file's own folder if that has
none. The package is importable as if it were on Python's path. So a config file may import its
neighbours (`from .common import EPOCHS`) and is executed once in a process. A loader process in
which the result of `importer` has been called can import the same modules by name, and so unpickle
what they define.

Importing this module also makes `import torchvision` work; see workloads.torchvision_import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import workloads.torchvision_import  # noqa: F401

_ROOT = "_config_folder_"  # begins the names of packages that are not on Python's path
_paths: dict[str, str] = {}  # module name -> its file, or of a package its folder
_names: dict[str, str] = {}  # the inverse of _paths
_labels: dict[str, str] = {}  # a module's label (see `label`) -> its file


def import_file(path: Path) -> ModuleType:
    """Import a config file, or a folder's `__init__.py`, by its resolved path."""
    folders = package_folders(path)
    root = folders[0] if folders else path.parent
    name = _root_name(root)
    *parents, last = path.relative_to(root).parts
    for depth, part in enumerate(parents, 1):
        name = _child_name(name, part, root.joinpath(*parents[:depth]))
    if last != "__init__.py":
        has_namesake = path.with_suffix("").is_dir()  # a.py beside a/: Python would import a/
        name = _child_name(name, last if has_namesake else last.removesuffix(".py"), path)
    importlib.invalidate_caches()  # files beside it may have been written just now
    return importlib.import_module(name)


def package_folders(path: Path) -> list[Path]:
    """Return the folders above a file up to the first without `__init__.py`, outermost first."""
    folders = []
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        folders.insert(0, folder)
    return folders


def importer() -> Callable[[], None]:
    """Return a function that, called in another process, lets it import this process's configs."""
    return functools.partial(_add_paths, dict(_paths))


def forget_labels() -> None:
    """Forget the labels of earlier runs, on which those of the next run must not depend."""
    _labels.clear()


def label(module_name: str) -> str:
    """Return the name under which a module is printed and stored.

    A config file's label is its folder's and its own name, so that it is the same on every rank
    and in another clone of the repository. Where two config files of a run would have the same
    label, the later one gets as many more folders in its label as are needed to differ.
    """
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None or not (module_name in _paths or module_name.startswith(_ROOT)):
        return module_name
    parts = Path(file).with_suffix("").parts
    for num_parts in range(2, len(parts) + 1):
        text = "_".join(["_config", *parts[-num_parts:]])
        if _labels.setdefault(text, file) == file:
            break
    return text


class _Finder:
    """Finds the modules in `_paths`; other modules of their packages Python finds by itself."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        location = _paths.get(name)
        if location is None:
            return None
        if not Path(location).is_dir():
            return importlib.util.spec_from_file_location(
                name, location, loader=SourceFileLoader(name, location)
            )
        own = Path(location) / "__init__.py"
        if own.is_file():
            return importlib.util.spec_from_file_location(
                name, own, submodule_search_locations=[location]
            )
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations.append(location)
        return spec


def _add_paths(paths: dict[str, str]) -> None:
    _paths.update(paths)
    _names.update({path: name for name, path in paths.items()})


def _root_name(folder: Path) -> str:
    """Return a package's module name: its folder's name if Python finds the folder by that name,
    else a name of ours."""
    if str(folder) in _names:
        return _names[str(folder)]
    try:
        spec = importlib.util.find_spec(folder.name) if folder.name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    found = [] if spec is None else list(spec.submodule_search_locations or [])
    if [Path(location).resolve() for location in found] == [folder]:
        return folder.name
    name = f"{_ROOT}{len(_paths)}"
    _add_paths({name: str(folder)})
    return name


def _child_name(parent: str, part: str, path: Path) -> str:
    """Return the module name of a file or folder in a package.

    Dots of the file's name are written as %2e, because Python would split the module name there.
    """
    name = f"{parent}.{part.replace('.', '%2e')}"
    _add_paths({name: str(path)})
    return name


sys.meta_path.insert(0, _Finder())
