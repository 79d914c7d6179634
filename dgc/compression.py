"""The settings of Deep Gradient Compression: one frozen value, checked when it is made.

Source: Lin et al. 2018 (arXiv:1712.01887). The defaults are the predecessors', where they have one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a worker chooses and codes what it sends.

    Raises: ValueError, naming the setting, its value and what is allowed.
    """

    density: float = 0.001
    """Fraction of a tensor's entries sent in a step, in (0, 1]. 1 is the dense path."""
    density_warmup_epochs: int = 0
    """Epochs in which the density falls to `density`."""
    density_warmup: Sequence[float] | None = None
    """The density of each warm-up epoch; None: falling exponentially, from
    density ** (1 / (density_warmup_epochs + 1))."""
    momentum_correction: bool = True
    """Let SGD's momentum act before selection, in a velocity of this worker. An optimizer other
    than torch.optim.SGD keeps whatever momentum it has, after the exchange."""
    momentum: float | None = None
    """Momentum of the correction with another optimizer than SGD, which must have none then. None:
    no velocity, the best with an adaptive statistic."""
    mask_velocity: bool = True
    """Momentum factor masking: forget the velocity of an entry when it is sent."""
    residual_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the residual is stored between steps: 4, 2 or 1 bytes an element (int8: in blocks of 256
    with a scale), rounded stochastically, so that what rounding loses is 0 in the mean. float32 is
    exact: for float64 parameters it means float64, 8 bytes."""
    velocity_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the velocity is stored, if there is one."""
    preconditioning: Literal["late", "early", "after"] | None = None
    """Where a compressible tensor's gradient meets the optimizer's second moment. late: fed by this
    worker's dense gradients, it divides what leaves. early: likewise, it divides each gradient
    before it is accumulated. after: the optimizer itself, from what arrived. None: late with an
    optimizer that hands its second moment over (those of `optim`), after with others."""
    update_scale: float = 1.0
    """Multiply what arrives for compressible tensors. They want several times the rate that is best
    for dense training, and the vectors and small tensors that are sent whole do not: leave lr at
    that, and tune this (3 to 4 with late preconditioning in our runs)."""
    select_by: Literal["raw", "preconditioned"] = "raw"
    """Rank entries by the residual, or by the residual divided by the root of the second moment."""
    share_statistics: float = 0.0
    """Average second moments over workers, each as often as adds no more than this part of the
    bytes of its tensor's entries: 0.1 adds a tenth. 0: never; inf: in every step."""
    clip_norm: float | None = None
    """Bound of the gradient's 2-norm for the joined batch. Each of N workers clips its own at
    clip_norm / sqrt(N), before accumulation. None: no clipping."""
    clip_scope: Literal["global", "tensor"] = "global"
    """global: one norm over all T tensors and the sum of micro-batches; the exchange then waits for
    the end of backward. tensor: each tensor and each of A micro-batches by itself, its own
    gradient at clip_norm / sqrt(N T A), so that nothing waits and no gradient is kept."""
    min_numel: int = 1024
    """Smaller tensors, and all with fewer than two axes, are sent densely."""
    exact_below: int = 8192
    """Tensors of fewer elements are ranked exactly; larger ones have a threshold that is carried
    from step to step and steered, at a tenth of the cost."""
    k_tolerance: tuple[float, float] = (0.8, 1.3)
    """Counts within these multiples of the target are sent as they are; a larger one is reduced to
    the largest, and for a smaller one the residual is looked through again."""
    value_dtype: Literal["float32", "float16", "mxfp8", "mxfp4"] = "float32"
    """Type of the values sent: 32, 16, 8.25 or 4.25 bits (the last two in groups of 32 with a
    common power of two); what rounding takes off stays in the residual. float32 is exact: for
    float64 parameters it means float64, 64 bits."""
    index_coding: Literal["int32", "int64", "elias_fano"] = "int32"
    """How positions are sent: 32 or 64 bits, or about 2 + log2(1 / density), 12 at 0.1%."""
    protocol: Literal["auto", "gather", "sparse_all_reduce", "dense"] = "auto"
    """How entries reach the others: as they are, at all ranks (gather); summed by the owners of
    their positions, so that what a rank sends does not grow with the number of ranks
    (sparse_all_reduce); or with all others (dense). auto: what the cost model (wire/cost.py) finds
    fastest, bucket by bucket."""
    merged_factor: float = 4.0
    """A sparse all-reduce returns at most this many times the entries that one rank selects: those
    of largest sums. The others stay with who selected them."""
    two_level: bool | None = None
    """Sum densely within each node, and exchange sparsely between nodes, each local rank carrying
    its slice of every tensor. None: yes, if there are several nodes of several ranks."""
    ranks_per_island: int | None = None
    """Ranks that count as one node in two levels; None: those of a node."""
    link_gbit_per_s: float = 1.0
    """For the cost model: what a rank can send in a second."""
    link_latency_us: float = 50.0
    """For the cost model: microseconds until a message arrives, however short."""

    def __post_init__(self) -> None:
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                self._refuse(name, ", ".join(map(str, allowed)))
        for name, (allowed, is_allowed) in _RANGES.items():
            if not is_allowed(getattr(self, name)):
                self._refuse(name, allowed)
        warmup, num_epochs = self.density_warmup, self.density_warmup_epochs
        if warmup is not None and not (len(warmup) == num_epochs and all(map(_is_part, warmup))):
            self._refuse(
                "density_warmup",
                f"None, or {num_epochs} densities (density_warmup_epochs), each above 0 and at "
                f"most 1",
            )

    def _refuse(self, name: str, allowed: str) -> NoReturn:
        raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

    def is_compressible(self, parameter: Tensor) -> bool:
        """Tell whether a parameter's gradient may be sent sparsely, by its shape."""
        return parameter.dim() > 1 and parameter.numel() >= self.min_numel

    def density_at(self, epoch: int) -> float:
        """Return the density of an epoch, counted from 0.

        Example: density 0.001 after 5 epochs of exponential warm-up:
        0.316, 0.1, 0.0316, 0.01, 0.00316, then 0.001.
        """
        if epoch >= self.density_warmup_epochs:
            return self.density
        if self.density_warmup is not None:
            return self.density_warmup[epoch]
        return self.density ** ((epoch + 1) / (self.density_warmup_epochs + 1))


def _is_part(value: float) -> bool:
    return 0 < value <= 1


_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("above 0 and at most 1", _is_part),
    "density_warmup_epochs": ("0 or more", lambda epochs: epochs >= 0),
    "momentum": ("None, or from 0 to below 1", lambda m: m is None or 0 <= m < 1),
    "update_scale": ("above 0", lambda scale: 0 < scale < math.inf),
    "share_statistics": ("0 or more", lambda part: part >= 0),
    "clip_norm": ("None or above 0", lambda norm: norm is None or norm > 0),
    "min_numel": ("1 or more", lambda numel: numel >= 1),
    "exact_below": ("0 or more", lambda numel: numel >= 0),
    "k_tolerance": ("two multiples around 1", lambda pair: 0 < pair[0] <= 1 <= pair[1]),
    "merged_factor": ("1 or more", lambda factor: 1 <= factor < math.inf),
    "ranks_per_island": ("None or 1 or more", lambda ranks: ranks is None or ranks >= 1),
    "link_gbit_per_s": ("above 0", lambda speed: speed > 0),
    "link_latency_us": ("0 or more", lambda latency: latency >= 0),
}


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Return what is allowed for each setting whose type is a Literal, or one or None."""
    found = {}
    for name, hint in get_type_hints(Compression).items():
        values = [value for part in (hint, *get_args(hint)) for value in get_args(part)]
        values = [value for value in values if isinstance(value, str)]
        if values:
            found[name] = (*values, None) if type(None) in get_args(hint) else tuple(values)
    return found
