"""The pass over buffers in CUDA, by device.cu. ops.py has checked the arguments.

Work goes to torch's current stream of the tensors' device, and nothing here waits for it. There
are no temporaries but the lists, of a selection's capacity, and the report.
"""

from __future__ import annotations

import torch

from parsimony_kernels.buffers.arguments import accumulation, make_room
from parsimony_kernels.buffers.operands import BLOCK, Found, Pass
from parsimony_kernels.runtime.launch import THREADS, launch

# Enough to fill a GPU; few, because each of their warps ends in an atomic on one number.
MAX_BLOCKS = 4096
_LANES = 32


def accumulate(given: Pass) -> Found:
    work = accumulation(given)
    device = work.kept["report"].device
    kernel = "accumulate"
    if given.selection is not None:
        make_room(work, given, num_lists=1)
        kernel = "select_stored" if given.grad_N is None else "accumulate_select"
    blocks = -(-work.numel // (THREADS // _LANES * BLOCK))  # a warp for each of the buffer's
    launch(kernel, min(blocks, MAX_BLOCKS), work, device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return Found(
        work.kept["report"],
        work.kept.get("indices", nothing),
        work.kept.get("values", nothing.to(torch.float32)),
        work.kept.get("velocities"),
        is_sorted=False,
    )
