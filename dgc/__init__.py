"""Deep Gradient Compression: gradient -> agreed update, compressed on the way."""

from dgc.compression import Compression
from dgc.optimizer import DistributedOptimizer
from dgc.roles import row_sparse_names

__all__ = ["Compression", "DistributedOptimizer", "row_sparse_names"]
