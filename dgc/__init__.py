"""Deep Gradient Compression: from a gradient to the update that all ranks agree on.

optimizer/ is what a training loop meets; worker/ and selection/ are one rank's own; wire/ and
exchange/ are how entries travel, comm/ is who carries them; compression.py has the settings.
"""

import sys

import dgc.comm.job as job
import dgc.comm.torch_distributed.comm as torch_comm
from dgc.compression import Compression
from dgc.optimizer.distributed import DistributedOptimizer
from dgc.optimizer.layout import row_sparse_names

__all__ = ["Compression", "DistributedOptimizer", "row_sparse_names"]

# Where scripts written before these folders find what they import.
sys.modules.update({"dgc.job": job, "dgc.torch_comm": torch_comm})
