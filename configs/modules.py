"""Config files as Python modules, which the loader processes of a job can import as well.

A config file is a module of the package that its folder is, as if that were on Python's path: the
outermost folder above it of an unbroken row with an `__init__.py`, or else its own folder. So it
may import its neighbours (`from .common import EPOCHS`), is executed once in a process, and what
it defines is found by name wherever `importer` has been called.

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
_places: dict[str, str] = {}  # module name -> its file, or its folder if it is such a package
_names: dict[str, str] = {}  # the other way
_labels: dict[str, str] = {}  # what a module is called in print -> its file


def import_file(path: Path) -> ModuleType:
    """Import a config file, or a folder's `__init__.py`, by its resolved path."""
    folders = package_folders(path)
    root = folders[0] if folders else path.parent
    name = _root_name(root)
    *parents, last = path.relative_to(root).parts
    for depth, part in enumerate(parents, 1):
        name = _child_name(name, part, root.joinpath(*parents[:depth]))
    if last != "__init__.py":
        beside_its_folder = path.with_suffix("").is_dir()  # a folder goes before a file of its name
        name = _child_name(name, last if beside_its_folder else last.removesuffix(".py"), path)
    importlib.invalidate_caches()  # its neighbours may be as new as it is
    return importlib.import_module(name)


def package_folders(path: Path) -> list[Path]:
    """Return the unbroken row of folders with an `__init__.py` above a file, outermost first."""
    folders = []
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        folders.insert(0, folder)
    return folders


def importer() -> Callable[[], None]:
    """Return what, sent to another process and called there, lets it import this one's configs."""
    return functools.partial(_add_places, dict(_places))


def forget_labels() -> None:
    """Let the labels of a run depend on its files alone, and not on those of runs before it."""
    _labels.clear()


def label(module_name: str) -> str:
    """Return how a module is called in print: config files by folder and name, wherever they lie.

    It is the same on every rank, and in another clone. Where two config files of a run would be
    called alike, the later one gets as many more folders as tell them apart.
    """
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None or not (module_name in _places or module_name.startswith(_ROOT)):
        return module_name
    parts = Path(file).with_suffix("").parts
    for num_parts in range(2, len(parts) + 1):
        text = "_".join(["_config", *parts[-num_parts:]])
        if _labels.setdefault(text, file) == file:
            break
    return text


class _Finder:
    """Finds the modules whose places are known; their neighbours Python finds by itself."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        place = _places.get(name)
        if place is None:
            return None
        if not Path(place).is_dir():
            return importlib.util.spec_from_file_location(
                name, place, loader=SourceFileLoader(name, place)
            )
        own = Path(place) / "__init__.py"
        if own.is_file():
            return importlib.util.spec_from_file_location(
                name, own, submodule_search_locations=[place]
            )
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations.append(place)
        return spec


def _add_places(places: dict[str, str]) -> None:
    _places.update(places)
    _names.update({place: name for name, place in places.items()})


def _root_name(folder: Path) -> str:
    """Return the name of a package: its own, if that is where Python finds it."""
    if str(folder) in _names:
        return _names[str(folder)]
    try:
        spec = importlib.util.find_spec(folder.name) if folder.name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    found = [] if spec is None else list(spec.submodule_search_locations or [])
    if [Path(place).resolve() for place in found] == [folder]:
        return folder.name
    name = f"{_ROOT}{len(_places)}"
    _add_places({name: str(folder)})
    return name


def _child_name(parent: str, part: str, place: Path) -> str:
    """Return the name of a module of a package; Python would split it at a dot of the file's."""
    name = f"{parent}.{part.replace('.', '%2e')}"
    _add_places({name: str(place)})
    return name


sys.meta_path.insert(0, _Finder())
