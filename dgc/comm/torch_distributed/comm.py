"""torch.distributed behind the Comm protocol: for jobs that `torchrun` starts, or anyone else who
sets its variables, and for scripts that call `dist.init_process_group` themselves.

Ranks meet by names (mail.py), over gloo's connections of our own, whatever the default group is.
Several TorchComms of one process share it, as HorovodComms share Horovod.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store as _default_store

from dgc.comm import pieces
from dgc.comm.interface import Group, Names
from dgc.comm.launched import refuse_elastic_torchrun, refuse_loners
from dgc.comm.objects import Broadcasts
from dgc.comm.torch_distributed.fresh_store import fresh_store
from dgc.comm.torch_distributed.group import TorchGroup
from dgc.comm.torch_distributed.mail import FRAME_BYTES, Mail
from dgc.comm.torch_distributed.ordered_group import OrderedGroup, Turns


class _Life:
    """What all TorchComms share from the first that is made to the last that is closed."""

    def __init__(self) -> None:
        limit = pieces.stall_seconds() or 10 * 86_400
        self.begins_torch = not dist.is_initialized() and "MASTER_ADDR" in os.environ
        if "MASTER_ADDR" in os.environ:
            _choose_interface()
        if self.begins_torch:
            store, rank, self.size = next(dist.rendezvous("env://"))
            store = fresh_store(store, rank, self.size, limit)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size)
        self._world = dist.group.WORLD if dist.is_initialized() else None
        self.num_open = 0
        self.names = Names()
        backend, rank, self.size = None, 0, 1
        if self._world is not None:
            rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            store = fresh_store(_default_store(), rank, self.size, limit)
            timeout = timedelta(seconds=limit)
            backend = dist.ProcessGroupGloo(store, rank, self.size, timeout)
        self.mail = Mail(backend, rank, self.size)
        self.turns = Turns(self.mail)
        self._nccl_groups: dict[tuple[int, ...], OrderedGroup | None] = {}
        atexit.register(self.mail.leave)

    @property
    def is_over(self) -> bool:
        """Whether the person has ended torch.distributed, or begun it anew."""
        return self._world is not (dist.group.WORLD if dist.is_initialized() else None)

    def on_gpus(self, groups: Sequence[Sequence[int]]) -> OrderedGroup:
        """Return NCCL's collectives of this rank's group; all ranks make all groups, once."""
        for members in map(tuple, groups):
            if members not in self._nccl_groups:
                group = dist.new_group(list(members), backend="nccl")
                is_mine = self.mail.rank in members
                made = OrderedGroup(self.turns, self.mail, group, members) if is_mine else None
                self._nccl_groups[members] = made
        return next(self._nccl_groups[tuple(m)] for m in groups if self.mail.rank in m)

    def end(self) -> None:
        self.mail.leave()
        atexit.unregister(self.mail.leave)
        if self.begins_torch and not self.is_over:
            dist.destroy_process_group()


_life: _Life | None = None


class TorchComm(TorchGroup, Broadcasts):
    """torch.distributed's ranks: under `torchrun`, of a script's own process group, or alone.

    Calls `init_process_group` if nobody has and the environment says how (MASTER_ADDR and others).
    Any number may be made, on all ranks in one order; `close` of the last one ends what the first
    began. Tensors on the CPU go by gloo; those of a GPU by NCCL, if each rank of a machine can have
    a GPU of its own, else by gloo through the host's memory. NCCL has not been run here.
    Raises: RuntimeError in a job of torchrun whose size may change, and in one of several processes
        that finds itself alone.
    """

    can_split = True

    def __init__(self) -> None:
        global _life
        refuse_elastic_torchrun()
        if _life is None or _life.is_over:
            _life = _Life()
        self._life = _life
        self._life.num_open += 1
        self._is_open = True
        super().__init__(self._life.mail, range(self._life.size))
        refuse_loners(self.world_size, "torch.distributed")
        self._nodes = self._number_nodes()
        here = [r for r, node in enumerate(self._nodes) if node == self._nodes[self.rank]]
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        has_gpu = dist.is_nccl_available() and torch.cuda.device_count() >= self.local_size
        if self.world_size > 1 and all(self.all_gather_object(has_gpu)):
            self._on_gpus = self._life.on_gpus([range(self.world_size)])

    def unique_name(self, kind: str) -> str:
        return self._life.names.unique_name(kind)

    def nodes(self) -> list[int]:
        return list(self._nodes)

    def _number_nodes(self) -> list[int]:
        """A node is what one torchrun has started; without torchrun, what has one host name."""
        mine = os.environ.get("GROUP_RANK") or socket.gethostname()
        found = self.all_gather_object(mine)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(found))}
        return [numbers[name] for name in found]

    def split(self, groups: Sequence[Sequence[int]]) -> Group:
        groups = [sorted(ranks) for ranks in groups]
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return TorchGroup(
            self._mail, mine, self._life.on_gpus(groups) if self._on_gpus is not None else None
        )

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> None:
        """Overwrite `tensor` with a rank's, in place, a piece at a time."""
        key = self._key(name)
        parts = pieces.parts_of(tensor.detach()) if tensor.numel() else ()
        for number, part in enumerate(parts):
            wire, is_own = pieces.as_bytes(part.to("cpu"))
            self._pass_down(wire, f"{key}.{number}", name, root)
            if self.rank != root:
                pieces.take_in(part, wire, is_own and part.device.type == "cpu")

    def _pass_down(self, wire: Tensor, key: str, name: str, root: int) -> None:
        """Send bytes down a binomial tree; many only when the receiver has memory for them."""
        mail, parent, children = self._mail, *_tree(self.rank, root, self.world_size)
        is_large = wire.numel() > FRAME_BYTES // 2
        ready = torch.zeros(1, dtype=torch.uint8, device="cpu")
        if parent is not None:
            post = mail.expect(key, [parent], into={parent: wire})
            if is_large:
                mail.send(parent, f"{key}.ready", ready)
            mail.wait(post, key, name)
        if is_large and children:
            mail.wait(mail.expect(f"{key}.ready", children), f"{key}.ready", name)
        for child in children:
            mail.send(child, key, wire)
        mail.finish_sending(f"{key}.ready")
        mail.finish_sending(key)

    def barrier(self, name: str = "barrier") -> None:
        self.all_gather_async(torch.zeros(1, dtype=torch.uint8, device="cpu"), name).wait()

    def close(self) -> None:
        global _life
        if self._is_open:
            self._is_open = False
            self._life.num_open -= 1
            if not self._life.is_over:
                self.barrier("close")
            if self._life.num_open == 0:
                self._life.end()
                _life = None if _life is self._life else _life

    def abort(self) -> None:
        """End this rank with exit status 1; torchrun then ends the others. Does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _tree(rank: int, root: int, size: int) -> tuple[int | None, list[int]]:
    """Return a rank's parent and children in a binomial tree.

    Example: of 5 ranks from root 0, 0 has children 1, 2 and 4; 2 has 3.
    """
    vertex = (rank - root) % size
    parent = None if vertex == 0 else ((vertex & (vertex - 1)) + root) % size
    own_bit = vertex & -vertex or size
    steps = (1 << n for n in range(own_bit.bit_length()))
    children = [vertex + step for step in steps if step < own_bit and vertex + step < size]
    return parent, [(child + root) % size for child in reversed(children)]


def _choose_interface() -> None:
    """Let gloo use the network that leads to the first host.

    By itself it takes that of this host's own name, which on many machines is the loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], 9))
        except OSError:
            return
        address = probe.getsockname()[0]
    name = _interface_of(address)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_of(address: str) -> str | None:
    import fcntl
    import struct

    SIOCGIFADDR = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]
            except OSError:
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None
