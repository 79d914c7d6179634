"""What a gradient is multiplied with before anything else: clipping, and one over the loss scale.

Source: Lin et al. 2018 (arXiv:1712.01887), local gradient clipping: each worker clips its own
gradient, before accumulation, at its share of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from dgc.compression import Compression
from dgc.worker.stats import StepStats
from parsimony_kernels.runtime.operands import state_dtype


def scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Return a gradient times scale (1,), in float32, or float64 if that is what the gradient is;
    the gradient itself if nothing is to be done."""
    return grad.to(state_dtype(grad.dtype)) if scale is None else grad * scale


class Scaling:
    """One rank's factors; see Compression.clip_norm and clip_scope for the shares."""

    def __init__(
        self,
        compression: Compression,
        scaler: GradScaler | None,
        *,
        world_size: int,
        num_tensors: int,
    ) -> None:
        self._clip_norm, self._scope = compression.clip_norm, compression.clip_scope
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._world_size, self._num_tensors = world_size, num_tensors
        self._unscale: float | None = None
        self._norms: list[Tensor] = []
        self._factors: list[Tensor] = []

    @property
    def has_scaler(self) -> bool:
        """Whether losses are scaled."""
        return self._scaler is not None

    @property
    def scales(self) -> bool:
        """Whether gradients may be multiplied with anything at all."""
        return self._clip_norm is not None or self._scaler is not None

    @property
    def clips_globally(self) -> bool:
        return self._clip_norm is not None and self._scope == "global"

    def of_tensor(self, grad: Tensor, num_parts: int) -> Tensor | None:
        """Return (1,) what to multiply one of a tensor's `num_parts` gradients in this step with,
        float32 or for a float64 one float64; None for 1."""
        if self._clip_norm is not None:
            return self._clip(_norm(grad), num_parts, self._num_tensors * num_parts)
        unscale = self._unscale_factor()
        if unscale == 1:
            return None
        return torch.full((1,), unscale, dtype=state_dtype(grad.dtype), device=grad.device)

    def of_all(self, grads: Sequence[Tensor]) -> Tensor:
        """Return (1,) what to multiply all gradients with, by their joint norm: float32, or
        float64 if any of them is."""
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        norms = [_norm(grad).to(grads[0].device, dtype) for grad in grads]
        return self._clip(torch.linalg.vector_norm(torch.stack(norms)), 1, 1)

    def check_call(self, optimizer: Optimizer) -> None:
        """Refuse a GradScaler that we do not know, or that has unscaled what it could find.

        GradScaler.step sets `grad_scale` while it calls: None where the caller has unscaled.
        """
        if not hasattr(optimizer, "grad_scale"):
            return
        if self._scaler is None:
            raise RuntimeError(
                "a GradScaler steps this optimizer, which has taken the scaled gradients as they "
                "were; give it to the DistributedOptimizer as grad_scaler="
            )
        if optimizer.grad_scale is None:
            raise RuntimeError(
                "GradScaler.unscale_ was called, but gradients are unscaled as they are taken; "
                "leave it out, and clip with Compression(clip_norm=...)"
            )

    def end_step(self, stats: StepStats) -> None:
        """Leave the step's norms and factors in its stats."""
        stats.gradient_norms, stats.clip_factors = self._norms, self._factors
        self._norms, self._factors, self._unscale = [], [], None

    def tell_scaler(self, optimizer: Optimizer, is_skipped: bool, device: torch.device) -> None:
        """Let GradScaler.update know whether any rank had an infinity, so that all scale alike."""
        if self._scaler is not None:
            found = self._scaler._found_inf_per_device(optimizer)
            found.clear()
            found[device] = torch.full((), float(is_skipped), dtype=torch.float32, device=device)

    def _unscale_factor(self) -> float:
        """Return 1 / the loss scale, read once a step."""
        if self._scaler is None:
            return 1.0
        if self._unscale is None:
            self._unscale = 1.0 / self._scaler.get_scale()
        return self._unscale

    def _clip(self, norm: Tensor, num_micro_batches: int, num_parts: int) -> Tensor:
        """Return (1,): 1 / loss scale, and so much less that a gradient of this norm, times the
        micro-batches, which is one of world_size * num_parts, is within its share of the bound."""
        unscale = self._unscale_factor()
        threshold = self._clip_norm / math.sqrt(self._world_size * num_parts)
        norm = norm if unscale == 1 else norm * unscale
        tiny = torch.finfo(norm.dtype).tiny
        whole = norm if num_micro_batches == 1 else norm * num_micro_batches
        factor = (threshold / whole.clamp(min=tiny)).clamp(max=1)
        self._norms.append(norm)
        self._factors.append(factor)
        scale = factor if unscale == 1 else factor * unscale
        # Makes all ranks undo the step; a factor of 0 would silently add nothing.
        nan = torch.full_like(factor, float("nan"))
        return torch.where(torch.isfinite(norm), scale, nan).view(1)


def _norm(grad: Tensor) -> Tensor:
    """Return the 2-norm, in float32 or for a float64 gradient in float64."""
    return torch.linalg.vector_norm(grad, dtype=state_dtype(grad.dtype))
