"""DistributedOptimizer: a torch optimizer whose gradients are compressed, exchanged and averaged.

Owns: what a person's training loop meets. setup/: what is checked and taken over when an
optimizer is wrapped; hooks/: how gradients come from autograd.
"""

from dgc.optimizer.distributed import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
