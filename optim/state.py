"""StatefulOptimizer: the state of a torch.optim.Optimizer with two moments, and its checkpoints.

MomentOptimizer, its subclass, explains the options and when state is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from optim import loading, options
from optim.gradients import check_parameter
from optim.moments import STRUCTURES, Moment, Spec, count_of_steps
from optim.plans import Plan
from optim.preconditioner import Preconditioner
from parsimony_kernels.runtime.operands import state_dtype

Group = dict[str, Any]
FIRST, SECOND = 0, 1


class StatefulOptimizer(Optimizer):
    """An optimizer that keeps a first and a second moment of each parameter.

    first_follows_update: the first moment averages updates, after they are divided by the root of
        the second, not gradients.
    structures: the structures of the moments where the options first_moment and second_moment are
        None.
    older_names: the names of state in older checkpoints -> the present names.
    """

    first_follows_update: ClassVar[bool] = False
    structures: ClassVar[Mapping[str, str]] = {"first_moment": "full", "second_moment": "full"}
    older_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, params: Any, defaults: Group) -> None:
        self._delegated: dict[Tensor, Preconditioner | None] = {}
        self._unfitted: set[Tensor] = set()  # whose state was loaded before their shape was known
        self._plans: dict[Tensor, Plan | None] = {}  # None: it can have none
        unset = {k: v for k, v in self.structures.items() if defaults.get(k, "") is None}
        defaults = {**defaults, **unset}
        options.check(defaults)  # before the parameters are looked at, as in torch
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle gets; torch's own method leaves out our attributes."""
        delegated = dict.fromkeys(self._delegated)  # delegated moments belong to the original
        own = {"_delegated": delegated, "_unfitted": self._unfitted, "_plans": {}}
        return {**super().__getstate__(), **own}

    # ---- what a subclass says --------------------------------------------------------------------

    def _first(self, group: Group) -> tuple[str, str] | None:
        """Return the name and structure of the first moment; None if there is none."""
        return None

    def _second(self, group: Group) -> tuple[str, str] | None:
        return None

    # ---- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            options.check(self.param_groups[-1])
            for position, group, p in self._parameters():
                if group is self.param_groups[-1] and p.requires_grad:
                    self._make_state(position, group, p)
        except Exception:
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)
            raise

    def _parameters(self) -> Iterator[tuple[int, Group, Tensor]]:
        """Yield (position in the optimizer, group, parameter) of every parameter."""
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        return ((position, group, p) for position, (group, p) in enumerate(pairs))

    def _make_state(self, position: int, group: Group, p: Tensor) -> None:
        """Make a parameter's state, if its shape is known."""
        check_parameter(p)
        if not is_lazy(p):
            self._moments(position, group, p)

    def _moments(
        self, position: int, group: Group, p: Tensor
    ) -> tuple[Moment | None, Moment | None]:
        """Return a parameter's first and second moment; make the missing parts of its state.

        There is a first moment while its weight, betas[0] or momentum, is above 0. One that begins
        later begins at 0: the gradients until then have acted on the parameter in full.
        Raises: ValueError, if the options now ask for another structure than in earlier steps.
        """
        check_parameter(p)
        if self._unfitted and p in self._unfitted:
            self.state[p] = self._fitted(position, group, p, self.state[p])
            self._unfitted.discard(p)
        state = self.state[p]
        before = dict(state)
        if not before:
            state["step"] = count_of_steps()
        first = self._moment(position, group, p, state, FIRST)
        second = None
        if not (self._delegated and p in self._delegated):
            second = self._moment(position, group, p, state, SECOND)
        if before and len(state) != len(before):
            _check_begun(position, state, before, first)
        if first is None:
            loading.drop_first(state)
        return first, second

    def _moment(
        self,
        position: int,
        group: Group,
        p: Tensor,
        state: dict[str, Tensor],
        which: int,
        device: torch.device | None = None,
    ) -> Moment | None:
        """Return a moment over a parameter's state; None if the optimizer has no such moment.

        Args: which: FIRST or SECOND. device: for the moment; None: the parameter's.
        """
        chosen = (self._first, self._second)[which](group)
        if chosen is None:
            return None
        is_small = p.dim() < 2 or p.numel() < max(group["min_compressed_numel"], 1)
        spec = Spec(
            name=chosen[0],
            shape=tuple(p.shape),
            device=device or p.device,
            dtype=state_dtype(p.dtype),
            is_first=which == FIRST,
            follows_update=which == FIRST and self.first_follows_update,
            seed_key=(group.get("seed", 0), position, which),
            options=group,
        )
        return STRUCTURES["full" if is_small else chosen[1]](spec, state)

    def estimate(self, p: Tensor) -> Tensor:
        """Return the second moment of each element, without bias correction.

        For tests and benchmarks: it makes a tensor of the parameter's size.
        """
        for position, group, parameter in self._parameters():
            second = self._moments(position, group, p)[1] if parameter is p else None
            if second is not None:
                return second.estimate()
        raise ValueError("not a parameter of this optimizer, or one without a second moment")

    @property
    def num_bytes(self) -> int:
        """The bytes of all state."""
        return sum(self.state_bytes().values())

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of each parameter's state, by its name, or position if it has none."""
        named = [group.get("param_names", [None] * len(group["params"]))
                 for group in self.param_groups]  # fmt: skip
        names = chain.from_iterable(named)
        return {
            name or str(position): sum(t.nbytes for t in self.state.get(p, {}).values())
            for name, (position, _, p) in zip(names, self._parameters(), strict=True)
        }

    # ---- checkpoints -----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the options and a copy of the state of a checkpoint, ours or torch's.

        Options that say how state is kept do not change; a moment that the checkpoint has in full
        is put into its structure here (loading.compress), and a delegated second moment is loaded
        where it was delegated to. torch's own method would cast state to the parameter's dtype
        (pytorch issue 43706), share tensors with `state_dict`, and accept any shape.
        Raises: ValueError, before anything changes, if an option is not allowed or state does not
            fit the options; for an uninitialized parameter, in its first step.
        """
        fitted: dict[Tensor, dict[str, Tensor]] = {}

        def take(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            mine, theirs = self.param_groups, loaded["param_groups"]
            if [len(group["params"]) for group in mine] != [len(g["params"]) for g in theirs]:
                return loaded  # torch will refuse it
            groups = loading.merge_groups(mine, theirs)
            fitted.update(self._fit(groups, loaded["state"]))
            return {**loaded, "state": {}, "param_groups": groups}

        def put(_: Optimizer) -> None:
            for p, state in fitted.items():
                if (given := self._delegated.get(p)) is not None:
                    given.take_out_of(state)
            self.state.update(fitted)
            self._unfitted = {p for p in fitted if is_lazy(p)}
            for position, group, p in self._parameters():
                if p.requires_grad:
                    self._make_state(position, group, p)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _fit(
        self, groups: list[Group], states: Mapping[Any, Mapping[str, Any]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Return each parameter's loaded state, copied into the structures that it has here.

        Args:   groups: the checkpoint's, merged with ours (loading.merge_groups).
        Raises: ValueError if the state of any parameter does not fit.
        """
        loaded = ((key, group) for group in groups for key in group["params"])
        fitted = {}
        for (key, group), (position, _, p) in zip(loaded, self._parameters(), strict=True):
            theirs = states.get(key)
            if theirs and is_lazy(p):
                fitted[p] = {n: t.clone() for n, t in loading.tensors_of(theirs).items()}
            elif theirs:
                fitted[p] = self._fitted(position, group, p, theirs)
        return fitted

    def _fitted(
        self, position: int, group: Group, p: Tensor, theirs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return one parameter's loaded state, copied into the structures that it has here."""
        theirs = loading.read_state(theirs, self.older_names)
        meta = torch.device("meta")
        first, second = (self._moment(position, group, p, {}, k, meta) for k in (FIRST, SECOND))
        if first is None:
            loading.drop_first(theirs)
        for which, moment in ((FIRST, first), (SECOND, second)):
            if moment is not None and loading.is_to_be_compressed(moment, theirs):
                full = theirs.pop(moment.spec.name)
                kept = self._moment(position, group, p, {}, which, full.device)
                loading.compress(kept, full)
                theirs |= kept.tensors
        layout = self._layout(position, p, theirs, first, second)
        loading.refuse_other_rules(position, theirs, layout)
        return loading.fit_state(position, layout, theirs, p.device)

    def _layout(
        self,
        position: int,
        p: Tensor,
        theirs: dict[str, Tensor],
        first: Moment | None,
        second: Moment | None,
    ) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes that a loaded state must have.

        first, second: the parameter's moments, on the meta device, so that they take no memory.
        """
        layout = {"step": count_of_steps()}
        if first and theirs.keys() & first.tensors.keys():  # else the first moment begins later
            layout |= first.tensors
        if second is None:
            theirs.setdefault("step", count_of_steps())  # torch.optim.SGD does not count steps
        elif p not in self._delegated:
            if theirs.keys() == layout.keys():
                raise ValueError(
                    f"the checkpoint has no second moment for parameter {position}: it was saved "
                    f"while workers of a DistributedOptimizer had that, or by an optimizer that "
                    f"has none. Make the DistributedOptimizer first, and load the checkpoint there"
                )
            layout |= second.tensors
        elif (given := self._delegated[p]) is not None:
            if theirs.keys() & given.tensors.keys() > {"step"}:
                layout |= given.tensors
        return layout


def _check_begun(
    position: int, state: dict[str, Tensor], before: dict[str, Tensor], first: Moment | None
) -> None:
    """Refuse moments that began after the parameter's first step; only a first moment may.

    Args:   state, before: a parameter's state with the new moments, and without them.
    Raises: ValueError, after restoring the state.
    """
    begun = state.keys() - before.keys()
    num_steps = int(before.get("step", 0))
    if num_steps and not (first and begun == first.tensors.keys()):
        state.clear()
        state.update(before)
        raise ValueError(
            f"parameter {position} has {sorted(before)} after {num_steps} steps, and its options "
            f"now ask for {sorted(begun)}; first_moment, second_moment and min_compressed_numel "
            f"cannot change between steps. Make the optimizer anew, and load the state there"
        )
