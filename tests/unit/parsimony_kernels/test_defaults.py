"""torch.set_default_dtype and torch.set_default_device change no result of an operation."""

import dataclasses

import pytest
import torch

from parsimony_kernels.buffers import device as device_buffers
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Correction, Selection
from parsimony_kernels.buffers.ops import read_reports
from parsimony_kernels.packing import device as device_packing
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES
from parsimony_kernels.runtime.operands import Cover, Factored, Full, MomentOfUpdates, Rule, Table
from parsimony_kernels.step import device, ops
from tests.defaults import DEFAULTS, assert_same, torch_defaults

N, M = 40, 33
CPU = torch.device("cpu")
DEVICE = {"step": device, "buffers": device_buffers, "packing": device_packing}


@pytest.fixture(params=["native", "reference", "emulated"])
def implementation(request, monkeypatch):
    """Run the operations on C++, on the reference, and on the CUDA source, emulated."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")()
        for module in (ops, buffers, packing):
            monkeypatch.setattr(module, "implementing_module", lambda folder, *_: DEVICE[folder])
        yield
        return
    with ops.use(request.param):
        yield


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(operations, *inputs):
    """Compare what operations return of copies of the inputs, without and with each default."""
    copies = [[x.clone() for x in inputs] for _ in range(1 + len(DEFAULTS))]
    expected = operations(*copies.pop())
    for default in DEFAULTS:
        with torch_defaults(default):
            found = operations(*copies.pop())
        assert_same(found, expected)


def test_steps(implementation):
    rule = Rule(0.1, param_scale=0.9, first_forgetting=0.1, second_gain=0.3, second_forgetting=0.3)

    def steps(p, g, rows, indices, seeds, tables, n1, m1, n2, m2, full):
        seconds = (Cover(n1, m1), Factored(n2, m2), Table(tables[0], seeds, False), Full(full[0]))
        firsts = (Full(full[1]), None, Table(tables[1], seeds, True), MomentOfUpdates(full[2]))
        for first, second in zip(firsts, seconds, strict=True):
            ops.step(p, g, rule, first=first, second=second)
            ops.step(p, g[: len(rows)], rule, first=first, second=second, rows=rows)
            ops.step_elements(p, g.view(-1)[:9], indices, rule, first=first, second=second)
            ops.observe(g, rule, second)
        query = ops.sketch_query_elements(seconds[2], indices)
        return [p, n1, m1, n2, m2, full, tables, ops.sketch_query(seconds[2], rows), query]

    rows, indices, seeds = torch.arange(0, N, 3), torch.arange(0, 90, 10), torch.arange(3)
    state = torch.zeros(2, 3, 7, M), *(torch.zeros(n) for n in (N, M, N, M)), torch.zeros(3, N, M)
    check(steps, numbers(N, M), numbers(M, N).view(N, M), rows, indices, seeds, *state)


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_buffers(implementation, dtype):
    selection = Selection(threshold=1.5, capacity=300)
    correction = Correction(u_beta=0.9, u_gain=1.0, v_from_u=1.0, v_gain=0.0)

    def passes(grad, indices, values):
        kept = [buffers.empty(grad.numel(), dtype, CPU) for _ in range(2)]
        given = {"residual": kept[0], "velocity": kept[1], "key": 77}
        found = buffers.accumulate(
            grad, correction, **given, old_residual=None, old_velocity=None, selection=selection
        )
        again = dataclasses.replace(selection, threshold=0.5)
        stored = buffers.accumulate(None, correction, **given, old_residual=kept[0],
                                    old_velocity=kept[1], selection=again)  # fmt: skip
        none = buffers.accumulate(grad[:0], Correction(), residual=buffers.empty(0, dtype, CPU),
                                  old_residual=None, selection=selection)  # fmt: skip
        buffers.put(kept[0], indices[:2], None, 5)
        buffers.add(kept[0], indices, values, 5)
        parts = [part for buffer in kept for part in buffers.tensors(buffer)]
        reports = [dataclasses.astuple(r) for r in read_reports([found, stored, none])]
        entries = [f.entries(r[1]) for f, r in zip((found, stored, none), reports, strict=True)]
        return [parts, reports, entries, buffers.take(kept[0], indices), buffers.decode(kept[1])]

    check(passes, numbers(1000), torch.tensor([3, 500, 999]), torch.tensor([1.0, -2.0, 3.0]))


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_messages(implementation, value_dtype):
    def messages(positions, values):
        told = {"universe": 1000, "dim": 2, "value_dtype": value_dtype, "layout": 9}
        found = [packing.round_values(values, value_dtype)]
        for coding in INDEX_CODINGS:
            told["index_coding"] = coding
            message = packing.pack(positions, values, **told, flags=[True, False])
            found += [message, *packing.unpack(message, **told, num_flags=2)]
        lists = [positions, positions[1:] + 1], [values, values[2:]]
        return [*found, *packing.merge(*lists, 2)]

    check(messages, torch.tensor([3, 40, 998]), numbers(6))
