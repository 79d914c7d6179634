"""Deep Gradient Compression: gradient -> agreed update, compressed on the way."""

from dgc.compression import Compression
from dgc.optimizer import DistributedOptimizer

__all__ = ["Compression", "DistributedOptimizer"]
