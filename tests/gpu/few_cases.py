"""A few cases that launch every kernel, for compute-sanitizer to watch.

    python -m tests.gpu.few_cases

With --emulated: on the CPU, by tests/emulation.
"""

import contextlib
import itertools
import sys

import torch

from benchmarks.gpu import workers
from benchmarks.gpu.common import emulated
from dgc.wire.codec import Codec
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES
from parsimony_kernels.step import device
from tests.unit.optim.helpers import EVERY_OPTIMIZER, gradients, row_sparse
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.buffers import test_device as test_device_buffers
from tests.unit.parsimony_kernels.cases import Case
from tests.unit.parsimony_kernels.step import test_device_observe

KINDS = [("velocity", "cover"), ("full", "cover I"), ("none", "factored"), ("table", "table 3")]
SECONDS = ("full", "cover", "cover I", "factored", "table 3")


def run_a_few(where: torch.device) -> None:
    for (first, second), mode in ((kind, mode) for kind in KINDS for mode in cases.MODES):
        cases.check_steps(Case(first, second, mode, (65, 150)), device, where)
    for second, dtype in itertools.product(SECONDS, cases.DTYPES):
        case = Case("none", second, "dense", (65, 150), dtype)
        test_device_observe.check_observe(case, 0.5, where)
    cases.check_sketch(cases.sketch_cases()[2], device, where)
    for case in test_device_buffers.SIZE_CASES:
        test_device_buffers.check_accumulate(case, where)
    for dtype in buffers.DTYPES:
        test_device_buffers.check_select(dtype, 1000, where)
    test_device_buffers.check_own_kernels(1500, where)
    test_device_buffers.check_lagging(1500, where)
    for name, dtype in itertools.product(EVERY_OPTIMIZER, cases.DTYPES):
        step(name, dtype, where)
    for coding, dtype in itertools.product(INDEX_CODINGS, VALUE_DTYPES):
        send(coding, dtype, where)
    workers.train(where, "recommended", workers.model_of(40), 2)


def send(index_coding: str, value_dtype: str, where: torch.device) -> None:
    """Pack entries and unpack them."""
    codec = Codec(("tensor",), (5000,), 1, value_dtype, index_coding)
    positions = torch.arange(0, 5000, 37, device=where)
    message = codec.encode(positions, torch.ones(len(positions), device=where))
    assert torch.equal(codec.decode_one(message).positions_K, positions)


def step(name: str, dtype: torch.dtype, where: torch.device) -> None:
    """Step small tensors with gradients that are dense, of rows, and of elements."""
    shapes = (65, 150), (6, 2, 9), (7,)
    parameters = [torch.nn.Parameter(torch.ones(s, dtype=dtype, device=where)) for s in shapes]
    optimizer = EVERY_OPTIMIZER[name](parameters)
    for turn in range(3):
        for p in parameters:
            (grad,) = gradients(1, *p.shape, dtype=dtype, seed=turn)
            if turn == 1 and p.dim() > 1:
                grad = row_sparse(range(0, len(p), 2), grad[::2], p.shape)
            p.grad = (grad if turn < 2 else grad.to_sparse()).to(where)
        optimizer.step()


if __name__ == "__main__":
    on_cpu = "--emulated" in sys.argv
    with emulated() if on_cpu else contextlib.nullcontext():
        run_a_few(torch.device("cpu") if on_cpu else torch.device("cuda", 0))
