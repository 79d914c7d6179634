"""What the ranks say to each other, whoever carries it: Horovod, torch.distributed, or threads.

Owns: every collective, how a job begins and ends, and which ranks form an island. interface.py has
the protocols; horovod/, torch_distributed/ and local.py implement them.
"""

from dgc.comm.horovod.comm import HorovodComm, horovod_job
from dgc.comm.interface import Comm, Group, Handle, Names
from dgc.comm.launched import LaunchError
from dgc.comm.torch_distributed.comm import TorchComm

__all__ = [
    "Comm", "Group", "Handle", "HorovodComm", "LaunchError", "Names", "TorchComm", "horovod_job",
]  # fmt: skip
