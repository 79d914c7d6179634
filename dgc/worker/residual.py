"""What a worker has not sent yet: velocity and residual, one pair a tensor, never shared.

Owns: momentum correction, momentum factor masking, what is taken out and put back, and a step's
way back: until `end_step`, what was there before the step is kept beside what it made, so that a
step that is undone leaves no trace; of a velocity and residual in full, just the old velocity (see
lagging.py). The state is per rank and stays out of `optimizer.state`, which
Horovod would overwrite with rank 0's.
Source: Lin et al. 2018 (arXiv:1712.01887), momentum correction and momentum factor masking.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgc.worker import storage
from dgc.worker.elements import TensorSpec
from dgc.worker.lagging import Lagging
from dgc.worker.rounding import RoundingKeys
from dgc.worker.storage import KINDS
from dgc.worker.taken import Place, Taken, TakenTogether, spans
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import (
    VELOCITY_KEY,
    Buffer,
    Correction,
    Found,
    Pass,
    Put,
    Selection,
)
from parsimony_kernels.buffers.ops import tensors
from parsimony_kernels.runtime.kinds import by_kind
from parsimony_kernels.runtime.operands import STATE_DTYPES


class Gradient(NamedTuple):
    """A gradient on its way to its tensor's residual; see Compensation.accumulate."""

    name: str
    grad_N: Tensor
    scale: Tensor | None = None
    is_sent_whole: bool = False
    selection: Selection | None = None
    may_keep: bool = False
    first: int = 0


class _Residuals(MutableMapping[str, Buffer]):
    """The residuals by name; calls `show` with a name before that one is read."""

    def __init__(self, kept: dict[str, Buffer], show: Callable[[str], None]) -> None:
        self._kept, self._show = kept, show

    def __getitem__(self, name: str) -> Buffer:
        if name in self._kept:
            self._show(name)
        return self._kept[name]

    def __setitem__(self, name: str, buffer: Buffer) -> None:
        self._kept[name] = buffer

    def __delitem__(self, name: str) -> None:
        self._show(name)
        del self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class Compensation:
    """The worker's velocities and residuals, flat, by tensor name, in 4, 2 or 1 bytes an element.

    With momentum m:  u <- m u + g,  v <- v + u;  Nesterov:  u <- m (u + g),  v <- v + u + g.
    Without (m = 0) there is no velocity:  v <- v + g.
    Where a step has several gradients, g is their sum; u is multiplied by m once. Momentum
    may change between steps (`momentum` and `nesterov` are read in each); while it is 0 velocities
    rest.
    A tensor that is always sent whole keeps no residual between steps.

    Args: residual_dtype, velocity_dtype: float32, bfloat16, or int8 for 8-bit blocks (see
            parsimony_kernels/buffers); rounding is stochastic, so what it loses is 0 in the mean.
            Of a tensor whose gradients are float64, "float32" is float64: nothing is lost unless
            asked for.
        seed: of the rounding; other ranks should have other seeds.
        momentum_varies: velocities may be loaded also while momentum is 0.
    """

    def __init__(
        self,
        momentum: float = 0.0,
        nesterov: bool = False,
        mask_velocity: bool = True,
        residual_dtype: str = "float32",
        velocity_dtype: str = "float32",
        seed: int = 0,
        momentum_varies: bool = False,
    ) -> None:
        self.momentum_varies = momentum_varies
        self.momentum, self.nesterov, self.mask_velocity = momentum, nesterov, mask_velocity
        self.dtypes = {"residual": residual_dtype, "velocity": velocity_dtype}
        self._kept: dict[str, dict[str, Buffer]] = {kind: {} for kind in KINDS}
        self._lagging = Lagging()
        # Names of residuals that others may have read, and are not written in place.
        self._shown: set[str] = set()
        self.num_steps = 0
        # Of the last step that stood. Nesterov's velocities are stored times the momentum.
        self._last_momentum = 0.0
        self._rounding = RoundingKeys(seed)
        self._before: dict[tuple[str, str], Buffer | None] = {}
        # Rounding keys of this step's last gradients: entries are put back with the same.
        self._keys: dict[str, int] = {}

    @property
    def velocity(self) -> dict[str, Buffer]:
        return self._kept["velocity"]

    @property
    def residual(self) -> MutableMapping[str, Buffer]:
        """What is not sent yet. The next step writes other buffers, not those that are read."""
        return _Residuals(self._kept["residual"], self._show)

    def has_residual(self, name: str) -> bool:
        return name in self._kept["residual"]

    def _show(self, name: str) -> None:
        self._catch_up(name)
        self._shown.add(name)

    def accumulate(self, name: str, grad_N: Tensor, **more: Any) -> Found:
        """Do what `accumulate_together` does, with one gradient; more: the fields of Gradient."""
        return self.accumulate_together([Gradient(name, grad_N, **more)])[0]

    def accumulate_together(self, gradients: Sequence[Gradient]) -> list[Found]:
        """Add gradients, of several tensors, each times its scale (1,), to velocities and
        residuals; take large entries out.

        Of a gradient: may_keep: nobody else needs its memory, so that a residual of its dtype may
        take its place. selection: of the residual, in the same pass, and with a step's last
        gradient only; whether velocities are masked is this compensation's `mask_velocity`. first:
        what is added to the indices that are listed.
        """
        if not gradients:
            return []
        passes = [self._pass(gradient) for gradient in gradients]
        founds, _ = buffers.accumulate_together(passes)
        for gradient, each, found in zip(gradients, passes, founds, strict=True):
            if each.lags:
                self._lagging.open(gradient.name, found)
        return founds

    def _pass(self, gradient: Gradient) -> Pass:
        name, grad_N, scale, is_sent_whole, selection, may_keep, first = gradient
        is_first = ("residual", name) not in self._before
        room = grad_N if may_keep and grad_N.dtype in STATE_DTYPES else None
        key = self._keys[name] = self._rounding.key(name, self.num_steps)
        if is_first and selection is not None and self._may_lag(name, grad_N):
            old_velocity, velocity = self._renew("velocity", name, grad_N, room=room)
            residual = self._before["residual", name] = self._kept["residual"][name]
            return buffers.lagging_pass_of(
                grad_N, self.momentum, self._masking(selection),
                residual=residual, velocity=velocity, old_velocity=old_velocity,
                is_lagging=name in self._lagging, scale=scale, first=first,
            )  # fmt: skip
        self._catch_up(name)
        old_residual, residual = self._renew("residual", name, grad_N, is_sent_whole, room)
        old_velocity, velocity = None, None
        if self.momentum:
            old_velocity, velocity = self._renew("velocity", name, grad_N)
        return buffers.pass_of(
            grad_N, self._correction(is_first),
            residual=residual, old_residual=old_residual,
            velocity=velocity, old_velocity=old_velocity,
            scale=scale, key=key, selection=self._masking(selection), first=first,
        )  # fmt: skip

    def _may_lag(self, name: str, grad_N: Tensor) -> bool:
        """Tell whether velocity and residual are there, in full, and follow the plain rule."""
        if not self.momentum or self.nesterov or not self.mask_velocity or name in self._shown:
            return False
        exact = storage.exact(grad_N.dtype)
        has_both = all(
            name in kept and buffers.dtype_of(kept[name]) == exact for kept in self._kept.values()
        )
        return has_both and all(self._stored(kind, exact) == exact for kind in KINDS)

    def _catch_up_all(self) -> None:
        for name in self._lagging.names():
            self._catch_up(name)

    def _catch_up(self, name: str) -> None:
        """Let a residual not lag any more: in place, or in an open step beside the one before."""
        kept, velocity = self._kept["residual"], self._kept["velocity"].get(name)
        if self._lagging.is_open(name):
            copy = kept[name].clone()
            self._lagging.settle({name: copy})
            kept[name] = copy.add_(velocity)
            self._lagging.undo(name, self._before["residual", name])
        elif name in self._lagging:
            kept[name].add_(velocity)
        self._lagging.close(name, lags=False)

    def select_again(self, name: str, selection: Selection, first: int = 0) -> Found:
        """Take more out of the residual after this step's last gradient, in a pass of its own.

        first: what is added to the indices that are listed.
        """
        self._key_of(name)
        residual = self._kept["residual"][name]
        if self._lagging.is_open(name):
            velocity = self._kept["velocity"][name]
            self._lagging.settle({name: residual}, may_undo=True)
            found = buffers.select_lagging(residual, velocity, self._masking(selection), first)
            self._lagging.open(name, found)
            return found
        self._catch_up(name)
        residual = self._kept["residual"][name]
        return buffers.accumulate(
            None, Correction(), residual=residual, old_residual=residual,
            velocity=self._velocity_now(name), selection=self._masking(selection), first=first,
        )  # fmt: skip

    def _velocity_now(self, name: str) -> Buffer | None:
        """Return a tensor's velocity; None while velocities rest."""
        return self.velocity.get(name) if self.momentum else None

    def take_exactly(self, name: str, indices_K: Tensor) -> Taken:
        """Take these entries out, as a selection would."""
        key, velocities_K = self._key_of(name), None
        self._catch_up(name)
        residual = self._kept["residual"][name]
        values_K = buffers.take(residual, indices_K)
        buffers.put(residual, indices_K, None, key)
        velocity = self._velocity_now(name)
        if self.mask_velocity and velocity is not None:
            velocities_K = buffers.take(velocity, indices_K)
            buffers.put(velocity, indices_K, None, key)
        return Taken(indices_K, values_K, velocities_K)

    def put_back(self, name: str, taken: Taken) -> None:
        """Do what `put_back_together` does, with one tensor's entries."""
        place = Place(name, taken.indices_K.numel(), 0)
        parts = (taken.indices_K, taken.values_K, taken.velocities_K)
        self.put_back_together(TakenTogether([place], *parts))

    def put_back_together(self, taken: TakenTogether, staying: TakenTogether | None = None) -> None:
        """Undo, to the bit, that entries were taken out in this step: any of them, by any pass.

        staying: where each tensor's only pass took out just those and these, the ones that stay
        out: open residuals then need not be read.
        """
        stay = {} if staying is None else {part.places[0].name: part for part in staying.split()}
        for place, span in spans(taken.places):
            self._key_of(place.name)
            if self._lagging.is_written(place.name):  # what was there is not there any more
                self._catch_up(place.name)
            if self._lagging.is_open(place.name) and place.name in stay:
                self._lagging.retake(place.name, stay[place.name].positions_K, place.first)
            elif self._lagging.is_open(place.name):
                indices_K = taken.positions_K[span] - place.first
                values_K = self._kept["residual"][place.name][indices_K]
                self._lagging.write(place.name, indices_K, values_K, 0)
        self._put("residual", taken.places, taken.positions_K, taken.values_K, self._keys)
        if taken.velocities_K is not None:
            keys = {place.name: self._keys[place.name] ^ VELOCITY_KEY for place in taken.places}
            self._put("velocity", taken.places, taken.positions_K, taken.velocities_K, keys)

    def _put(
        self,
        kind: str,
        places: Sequence[Place],
        positions_K: Tensor,
        values_K: Tensor,
        keys: Mapping[str, int],
    ) -> None:
        """Write these values, but for those of residuals that are open and so are not written."""
        kept, are_written = self._kept[kind], []
        for place, span in spans(places):
            if kind == "velocity" or not self._lagging.is_open(place.name):
                put = Put(kept[place.name], place.count, place.first, keys[place.name])
                are_written.append((put, span))
        if not are_written:
            return
        puts = [put for put, _ in are_written]
        if sum(put.count for put in puts) < positions_K.numel():
            positions_K = torch.cat([positions_K[span] for _, span in are_written])
            values_K = torch.cat([values_K[span] for _, span in are_written])
        buffers.put_together(puts, positions_K, values_K)

    def put_back_where(self, name: str, taken: Taken, mask_K: Tensor) -> None:
        """Put some of these entries back, without waiting for a GPU: the others stay as they are
        now, which to write again changes nothing."""
        indices_K, kept = taken.indices_K, (self.residual[name], self._velocity_now(name))
        now = [
            None if then is None else torch.where(mask_K, then, buffers.take(buffer, indices_K))
            for then, buffer in zip((taken.values_K, taken.velocities_K), kept, strict=True)
        ]
        self.put_back(name, Taken(indices_K, *now))

    def keep_lost(self, name: str, indices_K: Tensor, lost_K: Tensor) -> None:
        """Do what `keep_lost_together` does, with one tensor's entries."""
        self.keep_lost_together([Place(name, indices_K.numel(), 0)], indices_K, lost_K)

    def keep_lost_together(
        self, places: Sequence[Place], positions_K: Tensor, lost_K: Tensor
    ) -> None:
        """Leave in residuals what coding lost of entries that were taken out and sent."""
        keys = {}
        for place, span in spans(places):
            keys[place.name] = self._rounding.key(place.name, self.num_steps)
            if self._lagging.is_open(place.name):
                self._lagging.write(place.name, positions_K[span], lost_K[span], place.first)
            else:
                self._catch_up(place.name)
        self._put("residual", places, positions_K, lost_K, keys)

    def add(self, name: str, indices_K: Tensor, values_K: Tensor) -> None:
        """Add to entries of the residual: what is to be sent another time. Indices are unique."""
        key = self._rounding.key(name, self.num_steps)
        self._catch_up(name)
        buffers.add(self._kept["residual"][name], indices_K, values_K, key)

    def drain(self, name: str) -> Tensor:
        """Return all there is to send, (N,), leaving no residual. The velocity stays.

        Averaged over ranks, this is momentum SGD to the letter, with or without masking.
        """
        self._catch_up(name)
        return buffers.decode(self._kept["residual"].pop(name))

    def start_velocity(self, name: str, momentum_N: Tensor) -> None:
        """Go on from the momentum buffer (N,) of a dense SGD, whatever the velocity was."""
        self._catch_up(name)
        if self.nesterov:
            momentum_N = momentum_N * (self._last_momentum or self.momentum)
        dtype = self._stored("velocity", storage.exact(momentum_N.dtype))
        self.velocity[name] = storage.rounded(momentum_N, dtype, zlib.crc32(name.encode()))

    def end_step(self, stands: bool) -> None:
        """Make the step's changes final if it stands; else undo them, to the bit."""
        if stands:
            self._settle_all()
            self.num_steps += 1
            self._last_momentum = self.momentum or self._last_momentum
        else:
            for name in {name for _, name in self._before}:
                self.drop(name)
        self._forget_before()

    def _settle_all(self) -> None:
        kept = self._kept["residual"]
        for residuals in by_kind({name: kept[name] for name in self._lagging.open_names()}):
            self._lagging.settle(residuals)
            for name in residuals:
                self._lagging.close(name, lags=True)

    def drop(self, name: str) -> None:
        """Undo what a tensor's gradients did in this step, to the bit."""
        if self._lagging.is_open(name):
            self._lagging.undo(name, self._before["residual", name])
        for kind in KINDS:
            if (kind, name) in self._before:
                kept, buffer = self._kept[kind], self._before.pop((kind, name))
                kept.pop(name, None)
                if buffer is not None:
                    kept[name] = buffer
                self._lagging.close(name, lags=False)
        self._keys.pop(name, None)
        self._rounding.drop(name)

    def _forget_before(self) -> None:
        self._before.clear()
        self._keys.clear()
        self._rounding.begin_step()

    def _renew(
        self,
        kind: str,
        name: str,
        grad_N: Tensor,
        is_sent_whole: bool = False,
        room: Tensor | None = None,
    ) -> tuple[Buffer | None, Buffer]:
        """Return a tensor's buffer to read, and the one to write: at first another.

        room: memory (N,) for it, if it is float32, or of a float64 tensor float64.
        """
        kept = self._kept[kind]
        old = kept.get(name)
        if (kind, name) in self._before:
            return old, old
        self._before[kind, name] = old
        exact = storage.exact(grad_N.dtype)
        dtype = exact if is_sent_whole else self._stored(kind, exact)
        if room is None or dtype != exact:
            room = buffers.empty(grad_N.numel(), dtype, grad_N.device)
        kept[name] = room
        if kind == "residual":
            self._shown.discard(name)
        return old, room

    def _stored(self, kind: str, exact: str) -> str:
        """Return as what a kind is stored, for tensors that are stored exactly as `exact`."""
        return exact if self.dtypes[kind] == "float32" else self.dtypes[kind]

    def _correction(self, is_first: bool) -> Correction:
        m = self.momentum
        if m == 0:
            return Correction()
        if is_first:
            factor = m * (m / (self._last_momentum or m)) if self.nesterov else m
            return Correction(factor, m, 1, 1) if self.nesterov else Correction(m, 1, 1, 0)
        return Correction(1, m, 0, 1 + m) if self.nesterov else Correction(1, 1, 0, 1)

    def _masking(self, selection: Selection | None) -> Selection | None:
        if selection is None:
            return None
        return dataclasses.replace(selection, mask_velocity=self.mask_velocity)

    def _key_of(self, name: str) -> int:
        if name not in self._keys:
            raise ValueError(
                f"{name} has no gradient in this step; entries are taken out, or put back, only "
                "between accumulate and the end of its step"
            )
        return self._keys[name]

    def norm(self) -> float:
        """Return the 2-norm of the residual, of all tensors together."""
        self._catch_up_all()
        parts = (buffers.decode(buffer) for buffer in self._kept["residual"].values())
        return math.hypot(
            *(torch.linalg.vector_norm(part, dtype=torch.float64).item() for part in parts)
        )

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes kept, by kind: velocity, residual."""
        return {
            kind: sum(t.nbytes for buffer in kept.values() for t in tensors(buffer))
            for kind, kept in self._kept.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors only; this rank's, not the replica's."""
        kinds = {
            kind: {name: storage.to_state(buffer) for name, buffer in getattr(self, kind).items()}
            for kind in KINDS
        }
        momentum = torch.tensor(self._last_momentum, dtype=torch.float64, device="cpu")
        num_steps = torch.tensor(self.num_steps, dtype=torch.int64, device="cpu")
        return {**kinds, "num_steps": num_steps, "momentum": momentum}

    def load_state_dict(self, state: dict[str, Any], specs: Mapping[str, TensorSpec]) -> None:
        """Take copies of what was saved, each on the device of its tensor.

        Raises: ValueError, before anything changes, for a tensor that is not here, or is of another
            size or stored otherwise here.
        """
        self.check_names(state, specs)
        loaded: dict[str, dict[str, Buffer]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for name, saved in state[kind].items():
                dtype = self._stored(kind, storage.exact(specs[name].dtype))
                loaded[kind][name] = storage.loaded(kind, saved, specs[name], dtype)
        self._kept = loaded
        self._lagging.clear()
        self.num_steps = int(state.get("num_steps", 0))
        self._last_momentum = float(state.get("momentum", self.momentum))
        self._forget_before()

    def check_names(self, state: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise ValueError for a saved state of tensors that are not here, or that needs momentum
        where there is none."""
        if state["velocity"] and not (self.momentum or self.momentum_varies):
            raise ValueError("velocities were saved; allowed: none, as there is no momentum here")
        for kind in KINDS:
            for name in state[kind].keys() - set(names):
                raise ValueError(f"the saved {kind} is of {name}, which is no parameter here")

    def inherit(
        self,
        residual: Mapping[str, Tensor],
        velocity: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        num_steps: int,
        momentum: float,
    ) -> None:
        """Begin with these values (N,) float64, by tensor, in place of what there was.

        They are rounded stochastically to how this worker stores them, so that over workers nothing
        is lost in the mean. momentum: of the last step that stood.
        """
        self._lagging.clear()
        for kind, given in {"residual": residual, "velocity": velocity}.items():
            self._kept[kind] = {n: self._rounded(kind, v, specs[n]) for n, v in given.items()}
        self.num_steps, self._last_momentum = num_steps, momentum
        self._forget_before()

    def _rounded(self, kind: str, values_N: Tensor, spec: TensorSpec) -> Buffer:
        exact = storage.exact(spec.dtype)
        # A key that no step has.
        key = self._rounding.key(f"{kind} of {spec.name}, inherited", self.num_steps)
        values_N = values_N.to(spec.device, getattr(torch, exact))
        return storage.rounded(values_N, self._stored(kind, exact), key)
