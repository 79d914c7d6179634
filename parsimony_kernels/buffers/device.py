"""The pass over buffers in CUDA, by device.cu. ops.py has checked the arguments.

Work goes to torch's current stream of the tensors' device, and nothing here waits for it. There
are no temporaries but the lists, of a selection's capacity, and the report.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parsimony_kernels.buffers.arguments import Accumulation, Putting, accumulation, make_room
from parsimony_kernels.buffers.operands import BLOCK, Buffer, Found, Pass
from parsimony_kernels.runtime.launch import THREADS, launch
from parsimony_kernels.runtime.operands import Storage

# Eight for each of a large GPU's multiprocessors, half of which run at a time.
MAX_BLOCKS = 1056
_LANES = 32


def accumulate(given: Pass) -> Found:
    work = accumulation(given)
    device = work.kept["report"].device
    if given.selection is not None:
        make_room(work, given, num_lists=1)
    blocks = -(-work.numel // (THREADS // _LANES * BLOCK))  # a warp for each of the buffer's
    launch(_kernel(given, work), min(blocks, MAX_BLOCKS), work, device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return Found(
        work.kept["report"],
        work.kept.get("indices", nothing),
        work.kept.get("values", nothing.to(torch.float32)),
        work.kept.get("velocities"),
        is_sorted=False,
    )


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


def put(buffer: Buffer, indices_K: Tensor, values_K: Tensor | None, key: int) -> None:
    num_blocks = min(-(-len(indices_K) // THREADS), MAX_BLOCKS)
    launch("put_values", num_blocks, Putting(buffer, indices_K, values_K, key), indices_K.device)
