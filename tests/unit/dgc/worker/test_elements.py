"""float64 and complex parameters: nothing is converted on the way."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.worker.elements import flattened, rows_of
from optim import Adam, FactoredAdam
from tests.unit.dgc.method import CHOICES, NO_FIRST, Job, assert_equal

ROWS, DIM = 40, 30
SHAPES = {"table": (ROWS, DIM), "matrix": (DIM, ROWS), "vector": (DIM,)}
SPARSE = {"density": 0.05, "min_numel": 1}


def parameters(dtype):
    generator, like = torch.Generator("cpu").manual_seed(0), {"dtype": dtype, "device": "cpu"}
    return {n: nn.Parameter(torch.randn(s, generator=generator, **like))
            for n, s in SHAPES.items()}  # fmt: skip


def loss_of(named, generator):
    """Of random words, in the table's dtype; the table's gradient is row-sparse."""
    words = torch.randint(ROWS, (7,), generator=generator, device="cpu")
    rows = nn.functional.embedding(words, named["table"], sparse=True)
    return ((rows @ named["matrix"]).square().mean() + (rows * named["vector"]).sum()) / 3


def train(comm, make, compression=None, num_steps=4, dtype=torch.float64, **settings):
    named = parameters(dtype)
    optimizer = DistributedOptimizer(
        make(named.values()), named.items(), comm=comm, compression=compression,
        row_sparse=["table"], bucket_bytes=1, **settings,
    )  # fmt: skip
    generator = torch.Generator("cpu").manual_seed(comm.rank)
    for _ in range(num_steps):
        loss_of(named, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in named.items()}, optimizer


def train_alone(make, world_size, num_steps=4, dtype=torch.float64):
    """Step on the mean of the workers' gradients, summed in rank order."""
    named = parameters(dtype)
    optimizer = make(named.values())
    generators = [torch.Generator().manual_seed(rank) for rank in range(world_size)]
    for _ in range(num_steps):
        grads = [torch.autograd.grad(loss_of(named, g), named.values()) for g in generators]
        for parameter, each in zip(named.values(), zip(*grads, strict=True), strict=True):
            each = [grad.coalesce() if grad.is_sparse else grad for grad in each]
            total = sum(each[1:], each[0])
            parameter.grad = (total.coalesce() if total.is_sparse else total) / world_size
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def momentum(params):
    """Rows keep their momentum: they do not go through the correction."""
    table, *others = params
    return torch.optim.SGD([{"params": [table]}, {"params": others}], lr=0.1, momentum=0.9)


def optims_adam(params):
    return Adam(params, lr=0.1)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("make", [sgd, momentum, optims_adam])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_density_one_is_the_optimizer_alone_on_the_mean_to_the_bit(make, world_size, dtype):
    density_one = Compression(density=1.0, preconditioning="after")
    alone = train_alone(make, world_size, dtype=dtype)
    for compression in (None, density_one):
        results = run_local(
            world_size, lambda comm, c=compression: train(comm, make, c, dtype=dtype)[0]
        )
        for result in results:
            if make is momentum and compression is density_one and world_size > 1:
                # each worker has a velocity of its own, and their mean is rounded otherwise
                close = 1e-13 if dtype == torch.float64 else 1e-5
                torch.testing.assert_close(result, alone, rtol=close, atol=close)
            else:
                assert_equal(result, alone)


class NoLoss(TorchDispatchMode):
    """Refuses to make anything narrower of float64, but what is only looked at."""

    LOOKS = ("_magnitude_bits", "note_gradient")  # reports of the largest, and a histogram

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        source = next((a for a in args[::-1] if isinstance(a, torch.Tensor)), None)
        if function._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            is_lost = source.dtype == torch.float64 and result.dtype.itemsize < 8
            frame, callers = sys._getframe(), set()
            while is_lost and frame:
                callers.add(frame.f_code.co_name)
                frame = frame.f_back
            assert not is_lost or callers & set(self.LOOKS), f"{function} to {result.dtype}"
        return result


@pytest.mark.parametrize(
    ("protocol", "preconditioning", "two_level"),
    [
        ("gather", "late", True),
        ("sparse_all_reduce", "late", False),
        ("dense", "late", True),
        ("sparse_all_reduce", "early", True),
        ("gather", "after", False),
    ],
)
def test_float64_is_never_narrowed(protocol, preconditioning, two_level):
    choice = {name: values[0] for name, values in CHOICES.items()} | {
        "protocol": protocol, "preconditioning": preconditioning, "two_level": two_level,
        "dtype": torch.float64, "momentum": 0.9, "clip": "tensor", "exact_below": 0,
        "share_statistics": 0.0 if preconditioning == "after" else math.inf,
    }  # fmt: skip

    def work(comm):
        with NoLoss():
            job = Job(comm, "factored", choice, bucket_bytes=1)
            for _ in range(2):
                job.step()
            assert job.optimizer.stats.payload_bytes
        return job.state()

    for state in run_local(4, work, ranks_per_node=2):
        kept = [t for part in ("velocity", "residual")
                for t in state["worker"]["compensation"][part].values()]  # fmt: skip
        assert {t.dtype for t in kept} == {torch.float64}


@pytest.mark.parametrize("protocol", ["gather", "sparse_all_reduce"])
@pytest.mark.parametrize("value_dtype", ["float32", "float16", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("two_level", [False, True])
def test_what_was_added_in_float64_was_sent_or_is_left(protocol, value_dtype, two_level):
    """To 1 in 10^14: whatever values are rounded to on the wire, the loss stays in the residual."""

    def work(comm):
        weight = nn.Parameter(torch.zeros(ROWS, DIM, dtype=torch.float64))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0), [("w", weight)], comm=comm,
            compression=Compression(**SPARSE, protocol=protocol, value_dtype=value_dtype,
                                    two_level=two_level, merged_factor=1.0, exact_below=0),
        )  # fmt: skip
        generator, added = torch.Generator().manual_seed(comm.rank), torch.zeros_like(weight)
        for _ in range(5):
            grad = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
            added += grad
            weight.grad = grad
            optimizer.step()
        return added.detach().view(-1), weight.detach().view(-1), optimizer

    results = run_local(4, work, ranks_per_node=2)
    residuals = [optimizer.compensation.residual["w"] for *_, optimizer in results]
    if two_level:  # islands are ranks 0, 1 and 2, 3, each rank having half of the tensor
        left = torch.cat([residuals[0] + residuals[2], residuals[1] + residuals[3]])
    else:
        left = sum(residuals)
    added = sum(added for added, *_ in results)
    torch.testing.assert_close(left - 4 * results[0][1], added, rtol=1e-14, atol=1e-14)
    if value_dtype == "float32" and protocol == "gather":
        stats = results[0][2].stats
        assert stats.sparse_bytes == pytest.approx(12 * stats.num_selected, abs=40)


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16", "int8"])
def test_a_saved_float64_worker_goes_on_to_the_bit_and_fits_no_other_dtype(residual_dtype):
    def make(params):
        return FactoredAdam(params, lr=0.1, betas=NO_FIRST, min_compressed_numel=0)

    compression = Compression(**SPARSE, residual_dtype=residual_dtype)

    def work(comm):
        _, optimizer = train(comm, make, compression)
        saved = copy.deepcopy(optimizer.worker_state_dict())
        other = train(comm, make, compression, num_steps=0)[1]
        other.load_worker_state_dict(saved)
        assert_equal(other.worker_state_dict(), saved)
        narrow = train(comm, make, compression, num_steps=0, dtype=torch.float32)[1]
        if residual_dtype == "float32":
            with pytest.raises(ValueError, match="saved as float64; allowed: float32"):
                narrow.load_worker_state_dict(saved)

    run_local(2, work)


@pytest.mark.parametrize("value", [1e25, 1e200, math.nan])
def test_float64_gradients_are_bound_later_than_float32s(value):
    def work(comm):
        named = parameters(torch.float64)
        optimizer = DistributedOptimizer(sgd(named.values()), named.items(), comm=comm)
        named["matrix"].grad = torch.full_like(named["matrix"], value)
        optimizer.step()
        return optimizer.stats.skipped

    assert (run_local(1, work)[0] is None) == (value == 1e25)


def test_buckets_never_mix_dtypes():
    def work(comm):
        named = {f"{n}.{d}": p for d in (torch.float64, torch.float32, torch.complex64,
                 torch.bfloat16) for n, p in parameters(d).items()}  # fmt: skip
        optimizer = DistributedOptimizer(
            sgd(named.values()), named.items(), comm=comm, compression=Compression(**SPARSE)
        )
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        dense = {b.dtype: b.costs["dense"].num_bytes / sum(s.numel for s in b.specs)
                 for b in optimizer.buckets}  # fmt: skip
        assert dense[torch.float64] == 2 * dense[torch.float32]
        return [{spec.dtype for spec in bucket.specs} for bucket in optimizer.buckets]

    for dtypes in run_local(2, work):
        assert len(dtypes) == 4 and all(len(each) == 1 for each in dtypes)


# ---- complex numbers -----------------------------------------------------------------------------


def train_complex(comm, dtype, make, compression, wraps=True, is_conjugate=False):
    """Fit a complex weight, stored as it comes or as a conjugate view of real-looking memory."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(ROWS, DIM, dtype=dtype, generator=generator)
    weight = nn.Parameter(torch.zeros(DIM, ROWS, dtype=dtype).t())
    odd = nn.Parameter(torch.ones(3, dtype=dtype.to_real()))  # what comes behind is at an odd place
    optimizer = make([weight, odd])
    if wraps:
        optimizer = DistributedOptimizer(optimizer, [("w", weight), ("odd", odd)], comm=comm,
                                         compression=compression)  # fmt: skip
    for _ in range(5):
        optimizer.zero_grad()
        difference = weight - target
        (difference * (difference.conj() if is_conjugate else difference).conj()).real.mean().mul(
            odd.square().mean()
        ).backward()
        optimizer.step()
        if wraps and weight.grad is not None:
            assert weight.grad.stride() == weight.stride() and weight.grad.dtype == dtype
    return weight.detach().clone()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("is_conjugate", [False, True])
@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.Adam(p, lr=0.1)])
def test_complex_parameters_train_as_alone(dtype, is_conjugate, make):
    alone = run_local(1, lambda comm: train_complex(
        comm, dtype, make, None, wraps=False, is_conjugate=is_conjugate))[0]  # fmt: skip
    for compression in (None, Compression(density=1.0)):
        for weight in run_local(2, lambda comm, c=compression: train_complex(
            comm, dtype, make, c, is_conjugate=is_conjugate)):  # fmt: skip
            assert torch.equal(weight, alone)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("protocol", ["gather", "sparse_all_reduce"])
def test_both_parts_of_complex_entries_are_sent_sparsely_or_stay(dtype, protocol):
    compression = Compression(**SPARSE, protocol=protocol, two_level=True)

    def work(comm):
        weight = nn.Parameter(torch.zeros(ROWS, DIM, dtype=dtype))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0), [("w", weight)], comm=comm, compression=compression
        )
        generator, added = torch.Generator().manual_seed(comm.rank), torch.zeros_like(weight)
        for _ in range(5):
            weight.grad = torch.randn(ROWS, DIM, dtype=dtype, generator=generator).conj()
            added += weight.grad
            optimizer.step()
        return added.detach(), weight.detach(), optimizer.compensation.residual["w"]

    results = run_local(4, work, ranks_per_node=2)
    halves = [results[n][2] + results[n + 2][2] for n in (0, 1)]
    left = torch.view_as_complex(torch.cat(halves).view(ROWS, DIM, 2))
    torch.testing.assert_close(left - 4 * results[0][1], sum(r[0] for r in results))
    assert results[0][1].real.count_nonzero() and results[0][1].imag.count_nonzero()


def test_row_sparse_gradients_of_complex_numbers_and_of_single_elements():
    dense = torch.zeros(6, 4, dtype=torch.complex64)
    dense[1, 2], dense[4] = 1 + 2j, 3j

    def work(comm, grad):
        weight = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), [("w", weight)],
                                         comm=comm, row_sparse=["w"])  # fmt: skip
        weight.grad = grad
        optimizer.step()
        return weight.detach()

    for given in (dense, dense.real, dense.imag.double()):
        for grad in (given.to_sparse(), given.to_sparse(1)):
            rows_K, values_KM = rows_of(grad)
            assert rows_K.tolist() == sorted({*given.nonzero()[:, 0].tolist()})
            assert not values_KM.is_complex()
            for weight in run_local(2, lambda comm, g=grad: work(comm, g)):
                assert torch.equal(weight, -given)


def test_elements_do_not_show_how_they_were_stored():
    x = torch.randn(3, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    for tensor in (x, x.conj(), x.t(), x.conj().t(), -x.conj(), x.conj().imag, x.imag, x[:, ::2]):
        found = flattened(tensor)
        plain = torch.tensor(tensor.tolist())
        expected = torch.view_as_real(plain) if plain.is_complex() else plain
        assert torch.equal(found, expected.reshape(-1))
        assert found.is_contiguous() and not found.is_neg()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex32])
def test_other_dtypes_are_refused(dtype):
    def work(comm):
        weight = nn.Parameter(torch.zeros(4, 4).to(dtype))
        with pytest.raises(ValueError, match="w is torch.*; allowed: float32, .*complex128"):
            DistributedOptimizer(sgd([weight]), [("w", weight)], comm=comm)

    run_local(1, work)
