"""Tensors that pretend to be on a GPU, with all that makes the host wait for one counted.

Their memory is the CPU's, and kernels run in the emulator; but they say that they are elsewhere, so
that the code that runs is that of a GPU. What waits: a number that is read, a shape that depends
on values, a copy from the device, or to it from memory that is not pinned, and an event.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from dgc.exchange import lanes
from parsimony_kernels.runtime import choice, launch, transfer
from tests.emulation.emulator import Emulator

# A torch without CUDA knows nothing of its devices; of this one it knows all but the values.
DEVICE, CPU = torch.device("meta"), torch.device("cpu")
ROOT = Path(__file__).parents[2]
_SHAPED_BY_VALUES = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_coalesce",
    "bincount", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip


# Views, and memory that nothing is written to yet.
_LAUNCH_NOTHING = {
    "view", "slice", "select", "split", "split_with_sizes", "as_strided", "unbind", "detach",
    "expand", "t", "transpose", "alias", "unsqueeze", "squeeze", "permute", "reshape", "view_as",
    "_unsafe_view", "chunk", "lift_fresh", "is_pinned", "record_stream", "_reshape_alias",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip

_current = threading.local()  # watch: that of this thread


class Pretended(Tensor):
    """A tensor on the pretended device; `held` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        _current.watch.note("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a pretended tensor, while none are watched")

    __torch_function__ = torch._C._disabled_torch_function_impl


class Watch(TorchDispatchMode):
    """In the block, of this thread, pretended tensors can be made and used; `waits` are counted,
    and `launches`, of kernels and of what torch launches, by the place from which they came."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __enter__(self):
        _current.watch = self
        return super().__enter__()

    @property
    def num_waits(self):
        return self.waits.total()

    def note(self, what):
        """Count a wait."""
        self.waits[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        is_there = any(isinstance(x, Pretended) for x in tree_iter((args, kwargs)))
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if wanted is not None:
            kwargs["device"] = CPU
        goes_there = is_there if wanted is None else wanted == DEVICE
        self._count(name, args, kwargs, is_there, goes_there)
        if (is_there or goes_there) and name not in _LAUNCH_NOTHING:
            self.launches[f"torch's {name} at {_place()}"] += 1
        is_pinned = bool(kwargs.get("pin_memory")) and not goes_there
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        old = [(x, x.held) for x in tree_iter(args) if isinstance(x, Pretended)]
        result = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        if not isinstance(result, Tensor) and not isinstance(result, (tuple, list)):
            return result
        known = {id(held): outer for outer, held in old}

        def wrapped(x):
            if not isinstance(x, Tensor) or not goes_there:
                return x
            return known[id(x)] if id(x) in known else Pretended(x)

        result = tree_map(wrapped, result)
        if is_pinned:
            result.is_in_pinned_memory = True
        return result

    def _count(self, name, args, kwargs, is_there, goes_there):
        if name == "_to_copy" and is_there != goes_there:
            if is_there:
                self.note("copy to the host")
            elif not (kwargs.get("non_blocking") and _is_pinned(args[0])):
                self.note("copy from memory that is not pinned")
        elif name == "copy_" and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
            host = args[1] if isinstance(args[0], Pretended) else args[0]
            does_not_block = kwargs.get("non_blocking") or any(args[2:])
            if not (does_not_block and _is_pinned(host)):
                self.note("copy")
        elif is_there and name in _SHAPED_BY_VALUES:
            self.note(name)
        elif is_there and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note("a boolean mask")
                elif index is not None and not isinstance(index, Pretended):
                    self.note("indices on the host")


def _place():
    """Return where in the program this thread is."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))]
    ours = [f for f in ours if f.filename != __file__ and ".venv" not in f.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _bare(x):
    return x.held if isinstance(x, Pretended) else x


def _is_pinned(tensor):
    return getattr(tensor, "is_in_pinned_memory", False)


class _Launcher:
    """The emulator, for workers that are threads: it runs one kernel at a time."""

    def __init__(self):
        self.emulator, self._lock = Emulator(), threading.Lock()

    def launch(self, name, num_blocks, argument, device):
        assert device == DEVICE
        _current.watch.launches[name] += 1
        with self._lock:
            self.emulator.launch(name, num_blocks, argument, CPU)


def pretend(monkeypatch):
    """Let kernels for pretended tensors run, and copies to the host be awaited."""

    class Event:
        def __init__(self):
            self.is_done = False

        def query(self):
            return self.is_done

        def synchronize(self):
            _current.watch.note("an event")
            self.is_done = True

    def start_copy(tensor):
        return tensor.held.clone(), Event()

    monkeypatch.setattr(launch, "launcher", _Launcher())
    monkeypatch.setattr(transfer, "_start_copy", start_copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    monkeypatch.setattr(lanes, "raw_stream", lambda device: 0)
    module = choice._module
    monkeypatch.setattr(
        choice, "_module",
        lambda chosen, folder, kind: module(chosen, folder, "cuda" if kind == "meta" else kind),
    )  # fmt: skip
