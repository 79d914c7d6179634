"""Whether all ranks have the same options, parameters and optimizer state, to the bit.

Ranks compare a checksum of each tensor. It is computed in pieces, on the tensor's own device.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dgc.comm.interface import Comm

_PIECE_BYTES = 16 * 2**20
_Entry = tuple[str, str, Any]  # (kind, name, value or checksum)

_REMEDIES = {
    "option": "give all ranks the same, load the state on every rank, or after rank 0 has loaded "
    "it call hvd.broadcast_optimizer_state(optimizer, root_rank=0)",
    "state": "load the state on every rank, or after rank 0 has loaded it call "
    "hvd.broadcast_optimizer_state(optimizer, root_rank=0)",
    "parameter": "parameters must change in step() alone, or on all ranks alike. A model loaded on "
    "one rank after the DistributedOptimizer was made: load it on every rank, or call "
    "hvd.broadcast_parameters(model.state_dict(), root_rank=0). A module whose forward pass writes "
    "its parameters, each rank those that its own batch reads, such as nn.Embedding(max_norm=...): "
    "leave max_norm out and renormalise after step(), on all ranks the whole table",
}


class Replicas:
    """The ranks' copies of one optimizer and its parameters.

    are_new: they have not been compared since they were made or loaded.
    """

    def __init__(self, comm: Comm, optimizer: Optimizer, named: Mapping[str, Tensor]) -> None:
        self._comm, self._optimizer, self._named = comm, optimizer, named
        self._name = comm.unique_name("replicas")
        self._collective = "compared_in_the_first_step"
        self.are_new = True

    def check_new(self, settings: Mapping[str, Any]) -> None:
        """Compare them because they are new. A collective, named after why it is needed.

        A rank that has loaded a state in mid-run alone waits here, and its time-out says so.
        """
        self.check(settings, ValueError, self._collective)
        self._collective = "compared_in_the_first_step_after_load_state_dict"
        self.are_new = False

    def check(self, settings: Mapping[str, Any], error: type[Exception], why: str) -> None:
        """Raise `error`, on all ranks, for the first thing in which a rank differs from rank 0."""
        if self._comm.world_size > 1:
            entries = describe(self._optimizer, self._named, settings)
            compare(self._comm, f"{self._name}.{why}", entries, error)


def describe(
    optimizer: Optimizer, named: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> list[_Entry]:
    """Return all that must be equal on all ranks: settings, options, parameters, optimizer state.

    Reads every parameter and every state tensor once; on a GPU waits for them.
    """
    entries: list[_Entry] = [("option", name, _plain(value)) for name, value in settings.items()]
    entries.append(("option", "the class of the optimizer", _name_of(type(optimizer))))
    names = {id(parameter): name for name, parameter in named.items()}
    for number, group in enumerate(optimizer.param_groups):
        members = [names.get(id(p), tuple(p.shape)) for p in group["params"]]
        entries.append(("option", f"params of parameter group {number}", members))
        for option, value in sorted(group.items()):
            if option != "params":
                title = f"{option} of parameter group {number}"
                entries.append(("option", title, _plain(value)))
    for name, parameter in named.items():
        entries.append(("parameter", name, _fingerprint(parameter)))
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        for key, value in sorted(state.items(), key=lambda item: str(item[0])):
            mine = _fingerprint(value) if torch.is_tensor(value) else _plain(value)
            entries.append(("state", f"{key} of {name}", mine))
    return entries


def compare(comm: Comm, collective: str, entries: list[_Entry], error: type[Exception]) -> None:
    """Raise `error`, on all ranks, for the first entry in which a rank differs from rank 0.

    A collective named `collective`; sends 8 bytes where all is equal.
    """
    digest = hashlib.blake2b(repr(entries).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, signed=True)], dtype=torch.int64, device="cpu")
    if len(set(comm.all_gather_async(mine, collective).wait().tolist())) == 1:
        return
    everyone = comm.all_gather_object(entries)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise error(_first_difference(everyone[0], theirs, rank))


def _first_difference(here: list[_Entry], there: list[_Entry], rank: int) -> str:
    ours, others = ({(kind, what): value for kind, what, value in side} for side in (here, there))
    for kind, what in [*ours, *(key for key in others if key not in ours)]:
        mine, theirs = (side.get((kind, what), "not there") for side in (ours, others))
        if mine != theirs:
            nouns = {"option": "", "state": "optimizer state: ", "parameter": "parameter "}
            return (
                f"rank 0 and rank {rank} differ in {nouns[kind]}{what}: {mine} on rank 0, {theirs} "
                f"on rank {rank}; {_REMEDIES[kind]}"
            )
    return f"rank 0 and rank {rank} name the same in another order"  # of parameters


def _fingerprint(tensor: Tensor) -> str:
    """Return shape, dtype and checksum of a tensor."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return f"{kind} with checksum {checksum(tensor.detach()):08x}"


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of the elements in order, whatever the strides and the device."""
    crc = 0
    for piece in _pieces(tensor):
        crc = zlib.crc32(piece.numpy(), crc)
    return crc


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's bytes in order, on the CPU, in pieces that are views where they can be."""
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        yield from _pieces(tensor.indices())
        yield from _pieces(tensor.values())
        return
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for piece in flat.split(max(1, _PIECE_BYTES // tensor.element_size())):
            yield piece.cpu().view(torch.uint8)
        return
    rows = max(1, _PIECE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
    for piece in tensor.split(rows):
        yield piece.cpu().contiguous().view(-1).view(torch.uint8)


def _plain(value: Any) -> Any:
    """Return what of an option can be compared between processes."""
    if torch.is_tensor(value):
        return str(value.dtype), value.detach().cpu().tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return sorted((str(key), _plain(part)) for key, part in value.items())
    if hasattr(value, "item"):
        return value.item()
    return _name_of(value if hasattr(value, "__qualname__") else type(value))


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{thing.__qualname__}"
