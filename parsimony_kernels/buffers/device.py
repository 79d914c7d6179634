"""The passes over buffers in CUDA, by device.cu. ops.py has checked the arguments.

Work goes to torch's current stream of the tensors' device, and nothing here waits for it. There
are no temporaries but the lists, of the selections' capacities, the reports, and what the kernels
are given. Tensors share launches: there is one for each kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.arguments import Puttings, Room, puttings
from parsimony_kernels.buffers.operands import BLOCK, Blocks, Buffer, Found, Pass, Put
from parsimony_kernels.runtime.launch import THREADS, launch
from parsimony_kernels.runtime.launches import Launches
from parsimony_kernels.runtime.transfer import upload_bytes

# Eight for each of a large GPU's multiprocessors, half of which run at a time.
MAX_BLOCKS = 1056
_LANES = 32
_ELEMENTS = THREADS // _LANES * BLOCK  # of a thread block's turn: a warp for each of the buffer's


def accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    room = Room.of(passes, [1] * len(passes))
    by_kernel: dict[str, list[tuple[bytes, int]]] = {}
    for given, packed in zip(passes, room.pack(passes), strict=True):
        turns = -(-given.numel // _ELEMENTS)
        by_kernel.setdefault(_kernel(given), []).append((packed, turns))
    launches = Launches(room.report.device)
    for kernel, given in by_kernel.items():
        packed, turns = zip(*given, strict=True)
        launches.launch(kernel, launches.append(packed), shares(turns))
    launches.run()
    return room.found(passes, room.lengths, is_sorted=False), room.report


def put(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    there = upload_bytes(puttings(puts), device=positions_K.device)
    values = None if values_K is None else values_K.data_ptr()
    argument = Puttings(there.data_ptr(), len(puts), positions_K.data_ptr(), values)
    num_blocks = min(-(-positions_K.numel() // THREADS), MAX_BLOCKS)
    launch("put_values", num_blocks, argument, positions_K.device)


def shares(turns: Sequence[int]) -> list[int]:
    """Return how many thread blocks each tensor gets, of about MAX_BLOCKS, by the turns it needs.

    No block has more turns than if all tensors were one.
    """
    total = max(sum(turns), MAX_BLOCKS)
    return [-(-each * MAX_BLOCKS // total) for each in turns]


# ---- which kernel --------------------------------------------------------------------------------

Kind = torch.dtype | type | None  # of storage: Blocks, or None if absent
_OWN = {torch.float32: "_float32", torch.bfloat16: "_bfloat16", Blocks: "_blocks"}


def _kernel(given: Pass) -> str:
    """Return the kernel for such a pass; where storage is common, it has one of its own."""
    if given.selection is None:
        return "accumulate"
    if given.grad_N is None:
        return "select_stored"
    stored = given.residual, given.old_residual, given.velocity, given.old_velocity
    return _selecting(given.lags, given.grad_N.dtype, *map(_kind, stored))


def _kind(buffer: Buffer | None) -> Kind:
    if buffer is None:
        return None
    return Blocks if isinstance(buffer, Blocks) else buffer.dtype


@functools.cache
def _selecting(
    lags: bool, of_grad: torch.dtype, residual: Kind, old_residual: Kind, velocity: Kind,
    old_velocity: Kind,
) -> str:  # fmt: skip
    grad = _OWN.get(of_grad, "")
    if lags:
        return f"accumulate_lagging{grad}"
    as_before = (old_residual, old_velocity) == (residual, velocity)
    if not grad or not as_before or velocity not in (None, residual):
        return "accumulate_select"
    return f"accumulate_select{grad}{_OWN[residual]}" + ("_velocity" if velocity else "")
