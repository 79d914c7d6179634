"""Which bytes are alive, of what kind, at every moment of a run: of real tensors or of fake ones.

A dispatch mode that sees every operation below autograd, notes each new storage, and is told by a
weak reference when it goes. What it writes is a log; the kinds at the peak are read from the log
when the run is over, so that a gradient counts as one from the moment its memory was taken, not
from when autograd handed it over.
What operations take and give back within themselves (the workspace of a convolution) is not seen.
Learnt from torch.distributed._tools.mem_tracker, which is private to torch and is not used.
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
    """What was alive at one moment: bytes by kind, and in which phase of the step that was."""

    by_kind: dict[str, int] = field(default_factory=dict)
    phase: str = ""

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


class Tracker(TorchDispatchMode):
    """Follows storages from `with` on; those made before are followed from when they are labelled.

    Not for several threads. device_type: storages on others (hashes' seeds, counters) count too,
    unless it is "cuda": then what lies on the CPU is left out and sizes are whole sectors.
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
        """Within: peaks are of this phase; what is made and never labelled is of this kind."""
        before = self._phase, self._default
        self._phase, self._default = name, default
        try:
            yield
        finally:
            self._phase, self._default = before

    def label(self, kind: str, tensors: Iterable[Any]) -> None:
        """Say of what kind these tensors' memory is from now on; the first label counts from the
        beginning."""
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
        """Label all that was made since `mark`, is alive, and has no label."""
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
        """Return what was alive at the peak, by kinds as they were known then, or first after."""
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
        """Follow a tensor's storage, or its new size; return its number."""
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
    """Return the tensors with memory that a value is: of a sparse tensor its indices and values."""
    has_memory = isinstance(value, Tensor) and not isinstance(value, HandedOver)
    if not has_memory or value.device.type == "meta":
        return []
    if value.is_sparse:
        parts = getattr(value, "_rows", None)  # of a fake one: see fakes.py
        return list(parts or (value._indices(), value._values()))
    return [value] if value.layout == torch.strided else []
