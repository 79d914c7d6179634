"""Who may import whom, held by walking the source: only downwards, and never in a circle."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "workloads": set(),
    "parsimony_kernels": set(),
    "dgc": {"parsimony_kernels"},
    "optim": {"parsimony_kernels"},
    "engine": set(),
    "memory": {"dgc", "engine", "optim", "parsimony_kernels"},
    "launch": set(),
    "configs": {"dgc", "optim", "workloads"},
    "assembly": {"configs", "dgc", "engine", "memory", "optim", "parsimony_kernels", "workloads"},
}
# Within a room, from the lowest folder or file to the highest: each imports only what stands before
# it. What is not named here (`dgc/__init__.py`) stands on top.
FLOORS = {
    "dgc": ["compression", "comm", "worker", "selection", "wire", "exchange", "optimizer"],
    "parsimony_kernels": ["runtime", "step", "buffers", "packing"],
}
MOST_ENTRIES = 8  # at the top level of these rooms
ONLY_IN = {
    "horovod": {"dgc/comm/horovod/comm.py"},
    "mpi4py": {"dgc/comm/horovod/comm.py", "launch/doctor.py"},
    "cupy": {"parsimony_kernels/runtime/launch.py", "launch/doctor.py"},
}
# All that these rooms need.
PACKAGES = {"parsimony_kernels": {"torch", "cupy", "numpy"}, "optim": {"torch"}}

FILES = [p for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def parts_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {".".join(parts_of(path)) for path in FILES}


def imports(path):
    """Yield (module, whether at import time) of a file, also those for the type checker alone.

    `from dgc.comm import pieces` imports dgc.comm.pieces, if that is a module.
    """
    tree = ast.parse(path.read_text())
    inner = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inner
        elif isinstance(node, ast.ImportFrom):
            package = parts_of(path)[: -node.level or None] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in MODULES else base, node not in inner


@every_file
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    for module, at_import in imports(path):
        top = module.split(".")[0]
        if top in (MAY_IMPORT.keys() | {"train", "benchmarks", "tests"}) - {room}:
            assert top in MAY_IMPORT[room], f"{room} imports {module}"
        elif room in PACKAGES and top not in sys.stdlib_module_names | {room}:
            assert top in PACKAGES[room], f"{room} imports {module}"
        if top in ONLY_IN:
            assert str(path.relative_to(ROOT)) in ONLY_IN[top], f"{path} imports {module}"
            assert not at_import, f"{path} imports {module} at import time"


def test_no_module_imports_itself_by_way_of_others():
    graph = {".".join(parts_of(path)): {m for m, _ in imports(path)} & MODULES for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("room", FLOORS)
def test_arrows_within_a_room_lead_downwards(room):
    floor = {name: number for number, name in enumerate(FLOORS[room])}
    for path in sorted((ROOT / room).rglob("*.py")):
        mine = parts_of(path)
        for module, _ in imports(path):
            theirs = module.split(".")
            if len(mine) < 2 or theirs[0] != room:
                continue
            assert len(theirs) > 1, f"{path} imports {room}, which stands above it"
            assert floor[theirs[1]] <= floor[mine[1]], f"{path} imports {module}"


@pytest.mark.parametrize("room", FLOORS)
def test_the_top_of_a_room_fits_one_look_and_each_folder_says_what_it_owns(room):
    entries = {p.name for p in (ROOT / room).iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    assert entries - {"__init__.py"} == {
        name if (ROOT / room / name).is_dir() else f"{name}.py" for name in FLOORS[room]
    }
    for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
        init = folder / "__init__.py"
        assert init.exists(), f"{folder} has no __init__.py"
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} does not say what it owns"


def test_importing_the_rooms_starts_nothing():
    rooms = (
        "configs.load, configs.schema, dgc, dgc.comm, engine.loop, parsimony_kernels.step.host, "
        "parsimony_kernels.step.device, "
        "parsimony_kernels.step.reference, optim, workloads.datasets, train"
    )
    code = (
        f"import {rooms}, sys\n"
        "loaded = {'horovod', 'mpi4py', 'cupy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_what_earlier_scripts_import_is_still_there():
    """The paths that the README has named. Each in a process of its own, as scripts are."""
    code = (
        "from dgc import Compression, DistributedOptimizer, row_sparse_names\n"
        "from dgc.comm import HorovodComm, horovod_job\n"
        "from dgc.torch_comm import TorchComm\n"
        "import dgc.job\n"
        "from dgc.job import job\n"
        "assert dgc.job.job is job\n"
        "from optim import SM3, FactoredAdam, SketchAdam\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
