"""The state of bitsandbytes' 8-bit Adam, for predictions: its sizes, not its arithmetic.

Source: Dettmers et al. 2022 (arXiv:2110.02861) and bitsandbytes 0.50. It keeps two moments in 8
bits, a float32 scale for each block of 256 elements, and two maps of 256 levels that all tensors
share. Tensors of fewer than 4096 elements have two float32 moments. Its step on a GPU takes no
temporary memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

BLOCK, LEAST = 256, 4096


class EightBitAdam(Optimizer):
    """Makes the state of 8-bit Adam in the first step; it does not train."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self._maps: dict[torch.device, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p].update(self._state(p))

    def _state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        if p.numel() < LEAST:
            return {name: torch.zeros_like(p, dtype=torch.float32) for name in _NAMES}
        where = {"dtype": torch.float32, "device": p.device}
        maps = self._maps.setdefault(
            p.device, {f"qmap{n}": torch.zeros(BLOCK, **where) for n in (1, 2)}
        )
        blocks = -(-p.numel() // BLOCK)
        return {
            **{name: torch.zeros_like(p, dtype=torch.uint8) for name in _NAMES},
            **maps,
            **{f"absmax{n}": torch.zeros(blocks, **where) for n in (1, 2)},
        }


_NAMES = ("state1", "state2")
