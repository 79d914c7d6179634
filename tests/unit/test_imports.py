"""Who may import whom (DESIGN.md, section 2), held by walking the source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "assembly", "configs", "dgc", "engine", "launch", "memory", "optim",
    "parsimony_kernels", "train",
    "workloads",
}  # fmt: skip
MAY_IMPORT = {
    "workloads": set(),
    "parsimony_kernels": set(),
    "dgc": {"parsimony_kernels"},
    "optim": {"parsimony_kernels"},
    "engine": set(),
    "memory": {"dgc", "engine", "optim", "parsimony_kernels"},
    "launch": set(),
    "configs": {"dgc", "optim", "workloads"},
}
ONLY_IN = {
    "horovod": {"dgc/comm/horovod/comm.py"},
    "mpi4py": {"dgc/comm/horovod/comm.py", "launch/doctor.py"},
    "cupy": {"parsimony_kernels/runtime/launch.py", "launch/doctor.py"},
}
# All that these rooms need.
PACKAGES = {"parsimony_kernels": {"torch", "cupy", "numpy"}, "optim": {"torch"}}


def imports(path):
    """Yield (module, whether at import time) of a file, without those for the type checker."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    inner = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inner
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node not in inner


FILES = [p for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    for module, at_import in imports(path):
        top = module.split(".")[0]
        if top in ROOMS - {room}:
            assert top in MAY_IMPORT[room], f"{room} imports {module}"
        elif room in PACKAGES and top not in sys.stdlib_module_names | {room}:
            assert top in PACKAGES[room], f"{room} imports {module}"
        if top in ONLY_IN:
            assert str(path.relative_to(ROOT)) in ONLY_IN[top], f"{path} imports {module}"
            assert not at_import, f"{path} imports {module} at import time"


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
