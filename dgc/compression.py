"""The settings of Deep Gradient Compression: one frozen value, checked when it is made.

Source: Lin et al. 2018 (arXiv:1712.01887). The defaults are the predecessors', where they have one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dgc.wire.codec import INDEX_CODINGS, VALUE_DTYPES, entry_bits
from dgc.wire.cost import PROTOCOLS, Network
from parsimony_kernels.buffers import ops as buffers


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
    """How entries reach the others: as they are, at all ranks (gather); summed by owners of slices,
    so that what a rank sends does not grow with their number (sparse_all_reduce); or with all
    others (dense). auto: what the cost model (dgc.wire.cost) finds fastest, bucket by bucket."""
    merged_factor: float = 4.0
    """A sparse all-reduce returns at most this many times the entries that one rank selects: those
    of largest sums. The others stay with who selected them."""
    two_level: bool | None = None
    """Sum densely within each node, and exchange sparsely between nodes, each local rank carrying
    its share of the tensors. None: yes, if there are several nodes of several ranks."""
    ranks_per_island: int | None = None
    """Ranks that count as one node in two levels; None: those of a node."""
    link_gbit_per_s: float = 1.0
    """For the cost model: what a rank can send in a second."""
    link_latency_us: float = 50.0
    """For the cost model: microseconds until a message arrives, however short."""

    def __post_init__(self) -> None:
        low, high = self.k_tolerance
        warmup = self.density_warmup
        for name, allowed, ok in (
            ("density", "above 0 and at most 1", 0 < self.density <= 1),
            ("density_warmup_epochs", "0 or more", self.density_warmup_epochs >= 0),
            (
                "density_warmup",
                f"None, or {self.density_warmup_epochs} densities (density_warmup_epochs), "
                f"each above 0 and at most 1",
                warmup is None
                or (
                    len(warmup) == self.density_warmup_epochs
                    and all(0 < density <= 1 for density in warmup)
                ),
            ),
            (
                "momentum",
                "None, or from 0 to below 1",
                self.momentum is None or 0 <= self.momentum < 1,
            ),
            *(
                (name, ", ".join(buffers.DTYPES), getattr(self, name) in buffers.DTYPES)
                for name in ("residual_dtype", "velocity_dtype")
            ),
            (
                "preconditioning",
                "late, early, after, None",
                self.preconditioning in ("late", "early", "after", None),
            ),
            ("update_scale", "above 0", 0 < self.update_scale < math.inf),
            ("select_by", "raw, preconditioned", self.select_by in ("raw", "preconditioned")),
            ("share_statistics", "0 or more", self.share_statistics >= 0),
            ("clip_norm", "None or above 0", self.clip_norm is None or self.clip_norm > 0),
            ("clip_scope", "global, tensor", self.clip_scope in ("global", "tensor")),
            ("min_numel", "1 or more", self.min_numel >= 1),
            ("exact_below", "0 or more", self.exact_below >= 0),
            ("k_tolerance", "two multiples around 1", 0 < low <= 1 <= high),
            ("value_dtype", ", ".join(VALUE_DTYPES), self.value_dtype in VALUE_DTYPES),
            ("index_coding", ", ".join(INDEX_CODINGS), self.index_coding in INDEX_CODINGS),
            (
                "protocol",
                ", ".join(("auto", *PROTOCOLS)),
                self.protocol in ("auto", *PROTOCOLS),
            ),
            ("merged_factor", "1 or more", 1 <= self.merged_factor < math.inf),
            (
                "ranks_per_island",
                "None or 1 or more",
                self.ranks_per_island is None or self.ranks_per_island >= 1,
            ),
            ("link_gbit_per_s", "above 0", self.link_gbit_per_s > 0),
            ("link_latency_us", "0 or more", self.link_latency_us >= 0),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

    @property
    def entry_bytes(self) -> float:
        """Bytes of one entry on the wire, about."""
        return entry_bits(self.density, self.value_dtype, self.index_coding) / 8

    @property
    def network(self) -> Network:
        return Network(self.link_latency_us, self.link_gbit_per_s)

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
