"""The passes over buffers in CUDA, by device.cu. ops.py has checked the arguments.

Work goes to torch's current stream of the tensors' device, and nothing here waits for it. There
are no temporaries but the lists, of a selection's capacity, the reports, and what the kernels are
to do, which is copied from pinned memory.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

from torch import Tensor

from parsimony_kernels.buffers.arguments import Accumulation, Puttings, Together, puttings
from parsimony_kernels.buffers.operands import BLOCK, Found, Pass, Put
from parsimony_kernels.runtime.launch import THREADS, Batch, launch
from parsimony_kernels.runtime.operands import Storage
from parsimony_kernels.runtime.transfer import upload_bytes

# Eight for each of a large GPU's multiprocessors, half of which run at a time.
MAX_BLOCKS = 1056
_LANES = 32


def accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    together = Together(passes, lambda numel: 1)
    by_kernel: dict[str, list[Accumulation]] = {}
    for given, work in zip(passes, together.works, strict=True):
        by_kernel.setdefault(_kernel(given, work), []).append(work)
    for kernel, works in by_kernel.items():
        _launch(kernel, works, passes[0].device)
    return together.founds(lambda listed, number: listed, is_sorted=False), together.report


def _launch(kernel: str, works: Sequence[Accumulation], device: torch.device) -> None:
    # A warp for each of a buffer's blocks; of many blocks, each tensor has its share.
    wanted = [-(-work.numel // (THREADS // _LANES * BLOCK)) for work in works]
    most = min(1.0, MAX_BLOCKS / sum(wanted))
    ends = list(itertools.accumulate(max(1, int(blocks * most)) for blocks in wanted))
    there = upload_bytes((Accumulation * len(works))(*works), (ctypes.c_int64 * len(ends))(*ends),
                      device=device)  # fmt: skip
    at = there.data_ptr()
    batch = Batch(at, at + len(works) * ctypes.sizeof(Accumulation), len(works))
    launch(kernel, ends[-1], batch, device)


_OWN = {Storage.FLOAT32: "_float32", Storage.BFLOAT16: "_bfloat16", Storage.BLOCKS: "_blocks"}
_GRADIENTS = (Storage.FLOAT32, Storage.BFLOAT16)


def _kernel(given: Pass, work: Accumulation) -> str:
    """Return the kernel for such a pass; where storage is common, it has one of its own."""
    if given.selection is None:
        return "accumulate"
    if given.grad_N is None:
        return "select_stored"
    grad = _OWN[work.grad.storage] if work.grad.storage in _GRADIENTS else ""
    if given.lags:
        return f"accumulate_lagging{grad}"
    residual, velocity = work.residual.storage, work.velocity.storage
    as_before = (work.old_residual.storage, work.old_velocity.storage) == (residual, velocity)
    if not grad or not as_before or velocity not in (Storage.ABSENT, residual):
        return "accumulate_select"
    return f"accumulate_select{grad}{_OWN[residual]}" + ("_velocity" if velocity else "")


def put(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    device, there = positions_K.device, upload_bytes(puttings(puts), device=positions_K.device)
    values = None if values_K is None else values_K.data_ptr()
    argument = Puttings(there.data_ptr(), len(puts), positions_K.data_ptr(), values)
    launch("put_values", min(-(-positions_K.numel() // THREADS), MAX_BLOCKS), argument, device)
