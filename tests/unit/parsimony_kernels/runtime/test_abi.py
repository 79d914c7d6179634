"""Python and the compilers agree on abi.h: the offset of every field, and every number.

What Python has is written as static assertions, which a compiler checks without running anything.
"""

import ctypes
import shutil
import subprocess

import pytest

from parsimony_kernels.buffers import operands as buffers
from parsimony_kernels.buffers.arguments import Accumulation, Putting, Puttings, Stored, packer
from parsimony_kernels.packing import message
from parsimony_kernels.packing.device import Joined, Merging, Message, Packing
from parsimony_kernels.packing.host import EntryList
from parsimony_kernels.runtime import operands
from parsimony_kernels.runtime.build import compiler
from parsimony_kernels.runtime.launch import Batch
from parsimony_kernels.runtime.sources import PACKAGE
from parsimony_kernels.step.arguments import (
    DeviceStep,
    Feeding,
    HostStep,
    Inserted,
    Items,
    Query,
    Tiling,
)
from parsimony_kernels.step.roots import Rooting, Rootings

STRUCTURES = (
    *(operands.Rule, operands.Sketch, HostStep, Batch, DeviceStep, Feeding, Query, Items, Tiling),
    *(Rooting, Rootings),
    *(buffers.Correction, Stored, Accumulation, Putting, Puttings),
    *(message.Sections, EntryList, Packing, Message, Joined, Merging),
)
ENUMS = {
    "STORAGE": operands.Storage,
    "FIRST": operands.FirstKind,
    "SECOND": operands.SecondKind,
    "INSERTED": Inserted,
    "PROBLEM": message.Problem,
}
CODINGS = {"INDEX": message.INDEX_CODINGS, "VALUE": message.VALUE_DTYPES}
CONSTANTS = {
    buffers: ("BLOCK", "LEVELS", "MIN_SCALE", "BIN_SHIFT", "BINS"),
    message: (
        *("GROUP", "MAGIC", "HEADER_WORDS", "NO_POSITION"),
        *("TOTAL_WORD", "LAYOUT_WORD", "COUNT_WORD", "CHECKSUM_WORD"),
    ),
    operands: ("MAX_DEPTH",),
}


def assertions():
    for structure in STRUCTURES:
        name = structure.__name__
        yield f"sizeof({name}) == {ctypes.sizeof(structure)}"
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            yield f"offsetof({name}, {field}) == {place.offset}"
            yield f"sizeof((({name} *)nullptr)->{field}) == {place.size}"
    for prefix, enum in ENUMS.items():
        yield from (f"{prefix}_{member.name} == {member.value}" for member in enum)
    for prefix, names in CODINGS.items():
        yield from (f"{prefix}_{name.upper()} == {i}" for i, name in enumerate(names))
    for module, names in CONSTANTS.items():
        yield from (f"{name} == (decltype({name})){getattr(module, name)!r}" for name in names)


def compiled(path, command, claims):
    """Whether the claims hold, as far as this compiler knows."""
    lines = ["#include <cstddef>", '#include "runtime/abi.h"']
    lines += [f'static_assert({claim}, "{claim}");' for claim in claims]
    path.write_text("\n".join(lines))
    result = subprocess.run([*command, f"-I{PACKAGE}", str(path)], capture_output=True, text=True)
    return result.returncode == 0, result.stderr


def on_the_host(path, claims):
    return compiled(path / "abi.cpp", [*compiler(), "-std=c++17", "-fsyntax-only"], claims)


def on_the_device(path, claims):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    output = str(path / "abi.ptx")
    return compiled(path / "abi.cu", ["nvcc", "-ptx", "--std=c++14", "-o", output], claims)


@pytest.mark.parametrize("checked", [on_the_host, on_the_device])
def test_python_and_the_compiler_agree(tmp_path, checked):
    is_true, errors = checked(tmp_path, list(assertions()))
    assert is_true, errors


@pytest.mark.parametrize("checked", [on_the_host, on_the_device])
def test_a_field_elsewhere_and_a_number_that_differs_are_noticed(tmp_path, checked):
    for wrong in ("offsetof(Rule, lr) == 4", "SECOND_SKETCH == 4"):
        is_true, errors = checked(tmp_path, [wrong])
        assert not is_true and "assert" in errors


@pytest.mark.parametrize("structure", [Stored, Putting, Accumulation])
def test_what_is_packed_lies_where_ctypes_has_it(structure):
    given = [
        bytes(range(ctypes.sizeof(kind))) if issubclass(kind, ctypes.Structure) else number
        for number, (_, kind) in enumerate(structure._fields_, 1)
    ]
    packed = packer(structure).pack(*given)
    assert len(packed) == ctypes.sizeof(structure)
    there = structure.from_buffer_copy(packed)
    fields = [getattr(there, name) for name, _ in structure._fields_]
    assert [bytes(f) if isinstance(f, ctypes.Structure) else f for f in fields] == given
