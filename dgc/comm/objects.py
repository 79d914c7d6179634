"""Values to messages: what is not a tensor is pickled, and large tensors go by themselves.

A pickled tensor is three copies of it at once, and its bytes travel as one message. Here the
message says of a large tensor what it is like; whoever receives it makes a tensor, and is sent what
is in it in place. Tensors that are one in the value are one in what arrives.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor

# From this size on a tensor goes by itself: below, one more collective costs more.
LEAST_BYTES = 2**16
_LENGTH_BYTES = 8


class _Kind(NamedTuple):
    """What a tensor is like, but for its values; device_type: on whichever of its devices."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device_type: str
    requires_grad: bool

    def make(self) -> Tensor:
        made = torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device_type
        )
        return made.requires_grad_(self.requires_grad)


def pack(value: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the message (bytes,) uint8, and the tensors that are not in it, by number."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    length = file.tell()
    pickle.dump([_kind(tensor) for tensor in pickler.tensors], file)
    file.write(length.to_bytes(_LENGTH_BYTES, "little"))
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8), pickler.tensors


def make_tensors(message: Tensor) -> list[Tensor]:
    """Return tensors like those that are not in the message, with any values."""
    data = memoryview(message.numpy())
    return [kind.make() for kind in pickle.loads(data[_length(data) : -_LENGTH_BYTES])]


def unpack(message: Tensor, tensors: list[Tensor]) -> Any:
    """Return the value; tensors: those of `make_tensors`, which have their values now."""
    data = memoryview(message.numpy())
    unpickler = pickle.Unpickler(io.BytesIO(data[: _length(data)]))
    unpickler.persistent_load = tensors.__getitem__
    return unpickler.load()


def _length(data: memoryview) -> int:
    return int.from_bytes(data[-_LENGTH_BYTES:], "little")


class _Pickler(pickle.Pickler):
    """Leaves large tensors out, and collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Tensor or not _goes_alone(value):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


def _goes_alone(tensor: Tensor) -> bool:
    is_plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    is_here = tensor.device.type in ("cpu", "cuda")  # a tensor on "meta" has no data to send
    return is_plain and is_here and tensor.nbytes >= LEAST_BYTES and not vars(tensor)


def _kind(tensor: Tensor) -> _Kind:
    """A tensor that overlaps itself, or has gaps, arrives without."""
    stride = torch.empty_like(tensor, device="meta").stride()
    return _Kind(
        tensor.dtype, tuple(tensor.shape), stride, tensor.device.type, tensor.requires_grad
    )


# ---- sent by a Comm's other calls ----------------------------------------------------------------


class Broadcasts:
    """A Comm's broadcasts, and its objects, by one call of its own: `_broadcast` from any rank."""

    rank: int

    def all_gather_async(self, tensor: Tensor, name: str) -> Any:
        raise NotImplementedError

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> None:
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, name: str) -> None:
        self._broadcast(tensor, name, root=0)

    def broadcast_object(self, value: Any) -> Any:
        is_root = self.rank == 0
        message, tensors = pack(value) if is_root else (_bytes(0), [])
        size = _number(message.numel())
        self.broadcast(size, "object.size")
        if not is_root:
            message = _bytes(int(size))
        self.broadcast(message, "object.message")
        if not is_root:
            tensors = make_tensors(message)
        for tensor in tensors:
            self.broadcast(tensor, "object.tensor")
        return value if is_root else unpack(message, tensors)

    def all_gather_object(self, value: Any) -> list[Any]:
        message, mine = pack(value)
        sizes = self.all_gather_async(_number(message.numel()), "objects.sizes").wait().tolist()
        messages = self.all_gather_async(message, "objects.messages").wait().split(sizes)
        return [self._gathered(rank, part, mine) for rank, part in enumerate(messages)]

    def _gathered(self, rank: int, message: Tensor, mine: list[Tensor]) -> Any:
        """Return a rank's value; mine: this rank's tensors."""
        tensors = make_tensors(message)
        for number, tensor in enumerate(tensors):
            if rank == self.rank:
                tensor.detach().copy_(mine[number].detach())
            self._broadcast(tensor, "objects.tensor", root=rank)
        return unpack(message, tensors)


def _number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device="cpu")


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")
