"""Follow how many bytes of each kind are alive at every moment of a run, on real or fake tensors.

`Tracker` is a dispatch mode that sees every operation below autograd. It notes each new storage in
a log, and learns from a weak reference when the storage is freed. The kinds at the peak are read
from the log when the run is over, so that a gradient counts as a gradient from the moment when its
memory is allocated, though it can be labelled only when autograd hands it over.
Not seen is what operations allocate and free within themselves, such as a convolution's workspace.
The idea is that of torch.distributed._tools.mem_tracker, which is private to torch and not used.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgc.optimizer.hooks.handed_over import HandedOver

PARAMETERS, BUFFERS, INPUTS, CARRIED = "parameters", "buffers", "inputs", "carried state"
GRADIENTS, ACTIVATIONS, TEMPORARIES = "gradients", "activations", "temporaries"
EXCHANGE = "exchange buffers"
SECTOR = 512  # bytes: the CUDA allocator hands out multiples of it

_ALLOCATED, _FREED, _LABELLED = range(3)


@dataclass(frozen=True)
class Moment:
    """The bytes alive at one moment, by kind, and the phase of the step that the moment is in."""

    by_kind: dict[str, int] = field(default_factory=dict)
    phase: str = ""

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


class Tracker(TorchDispatchMode):
    """Follows storages that are made in its `with` block, and older ones once they are labelled.

    Not thread-safe.
    Args: device_type: of the job. "cpu": storages on all devices count. "cuda": storages on the
        CPU, such as hash seeds and counters, are left out, and sizes are rounded up to sectors.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._on_gpu = device_type != "cpu"
        self._log: list[tuple[int, int, Any]] = []
        self._ids: dict[int, int] = {}  # address of a storage -> its number
        self._watching: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}
        self._defaults: dict[int, str] = {}
        self._is_labelled: set[int] = set()
        self._next, self.live = 0, 0
        self._default, self._phase = TEMPORARIES, ""
        self._began = 0
        self.forget_peak()

    # ---- what is going on ------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str, default: str = TEMPORARIES) -> Iterator[None]:
        """In the block, count peaks for this phase; unlabelled storages are of kind `default`."""
        before = self._phase, self._default
        self._phase, self._default = name, default
        try:
            yield
        finally:
            self._phase, self._default = before

    def label(self, kind: str, tensors: Iterable[Any]) -> None:
        """Set the kind of these tensors' memory from now on; a first label holds from its start."""
        for tensor in tensors:
            for part in parts_of(tensor):
                number = self._note(part)
                if number is not None:
                    self._log.append((_LABELLED, number, kind))
                    self._is_labelled.add(number)

    def mark(self) -> None:
        """Begin to look for what `label_new` will label."""
        self._began = self._next

    def label_new(self, kind: str) -> None:
        """Label the storages that were made since `mark`, are alive and have no label."""
        for number in self._sizes:
            if number >= self._began and number not in self._is_labelled:
                self._log.append((_LABELLED, number, kind))
                self._is_labelled.add(number)

    def forget_peak(self) -> None:
        """Look for the peak from now on."""
        self.peak, self._peak_at, self._peak_phase = self.live, len(self._log), self._phase
        self.peak_by_phase: dict[str, int] = defaultdict(int)

    # ---- what it saw -----------------------------------------------------------------------------

    def now(self) -> Moment:
        """Return what is alive now."""
        return Moment(self._by_kind(len(self._log)), self._phase)

    def at_peak(self) -> Moment:
        """Return what was alive at the peak; storages without a label then have their next one."""
        return Moment(self._by_kind(self._peak_at), self._peak_phase)

    def _by_kind(self, at: int) -> dict[str, int]:
        sizes: dict[int, int] = {}
        kinds: dict[int, str] = {}
        for what, number, value in self._log[:at]:
            if what == _ALLOCATED:
                sizes[number] = value
            elif what == _FREED:
                del sizes[number]
            else:
                kinds[number] = value
        for what, number, value in self._log[at:]:
            if what == _LABELLED:
                kinds.setdefault(number, value)
        found: dict[str, int] = defaultdict(int)
        for number, size in sizes.items():
            found[kinds.get(number, self._defaults[number])] += size
        return {kind: size for kind, size in found.items() if size}

    # ---- storages --------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":
            for leaf in tree_leaves(result):
                for part in parts_of(leaf):
                    self._note(part)
        return result

    def _note(self, tensor: Tensor) -> int | None:
        """Follow a tensor's storage, or note its new size; return the number of the storage.

        Returns: None for a storage that does not count.
        """
        if self._on_gpu and tensor.device.type == "cpu":
            return None
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if self._on_gpu:
            size = -(-size // SECTOR) * SECTOR
        number = self._ids.get(address)
        if number is None:
            number = self._ids[address] = self._next
            self._next += 1
            self._defaults[number] = self._default
            self._watching[number] = weakref.ref(
                storage, lambda _, address=address, number=number: self._free(address, number)
            )
        elif self._sizes[number] == size:
            return number
        self._grow(number, size)
        return number

    def _grow(self, number: int, size: int) -> None:
        self._log.append((_ALLOCATED, number, size))
        self.live += size - self._sizes.get(number, 0)
        self._sizes[number] = size
        self.peak_by_phase[self._phase] = max(self.peak_by_phase[self._phase], self.live)
        if self.live > self.peak:
            self.peak, self._peak_at, self._peak_phase = self.live, len(self._log), self._phase

    def _free(self, address: int, number: int) -> None:
        del self._ids[address], self._watching[number]
        self._log.append((_FREED, number, None))
        self.live -= self._sizes.pop(number)


def parts_of(value: Any) -> list[Tensor]:
    """Return the dense tensors in which a tensor has its memory; [] for other values.

    Of a sparse tensor these are its indices and values.
    """
    has_memory = isinstance(value, Tensor) and not isinstance(value, HandedOver)
    if not has_memory or value.device.type == "meta":
        return []
    if value.is_sparse:
        parts = getattr(value, "_rows", None)  # set for fake tensors by answers.py
        return list(parts or (value._indices(), value._values()))
    return [value] if value.layout == torch.strided else []
