"""Entries of a bucket: where they are, who owns which positions, and what one takes on the wire."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from parsimony_kernels.packing.message import GROUP, VALUE_BITS

OWNER_BLOCK = 256  # consecutive positions that one owner has


class Entries(NamedTuple):
    """Some entries of a bucket, or of one flattened tensor.

    positions (K,) int64, ascending and unique; values (K * dim,) in the dtype of the bucket.
    bad: the numbers, in the bucket, of the tensors whose gradient is not finite. resting: of those
        that rest.
    """

    positions_K: Tensor
    values_M: Tensor
    bad: tuple[int, ...] = ()
    resting: tuple[int, ...] = ()


def to_owner(positions_K: Tensor, num_owners: int) -> tuple[Tensor, Tensor]:
    """Return each position's owner, and its position among the owner's own; blocks go in turn.

    Within an owner they ascend as the positions do.
    """
    block_K = positions_K // OWNER_BLOCK
    local_K = block_K // num_owners * OWNER_BLOCK + positions_K % OWNER_BLOCK
    return block_K % num_owners, local_K


def from_owner(local_K: Tensor, owner: int, num_owners: int) -> Tensor:
    """Return the positions in the bucket of positions among an owner's own."""
    block_K = local_K // OWNER_BLOCK * num_owners + owner
    return block_K * OWNER_BLOCK + local_K % OWNER_BLOCK


def entry_bits(density: float, value_dtype: str, index_coding: str, dim: int = 1) -> float:
    """Estimate the bits of an entry with its part of the scales, without the header.

    Example: at density 0.001 in mxfp8 and elias_fano 20.2, in mxfp4 16.2.
    """
    if index_coding == "elias_fano":
        low_bits = max(0, math.floor(math.log2(1 / density)))
        index_bits = low_bits + 1 + 1 / (density * 2**low_bits)
    else:
        index_bits = {"int32": 32, "int64": 64}[index_coding]
    scale_bits = 8 / GROUP if value_dtype.startswith("mx") else 0
    return index_bits + dim * (VALUE_BITS[value_dtype] + scale_bits)
