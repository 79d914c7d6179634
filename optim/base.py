"""MomentOptimizer: a torch.optim.Optimizer of a first and a second moment, each kept somehow.

Owns: options and their checks, state and its checkpoints, and what arrives (dense, row-sparse or
element-sparse). A subclass says which moments there are and the scalars of the rule; moments.py how
each is kept; kernels.ops does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernels import ops
from optim import options
from optim.gradients import Gradient, check_parameter, read_gradient
from optim.moments import STRUCTURES, Moment, Spec, balanced_split, fit_state, matrix_shape
from optim.preconditioner import Preconditioner

Group = dict[str, Any]
_FIRST, _SECOND = 0, 1


class MomentOptimizer(Optimizer):
    """What all optimizers here have in common. All options can be set for each parameter group.

    Args:
        lr: a float or a tensor; a tensor on a GPU is waited for in every step.
        weight_decay, decoupled_weight_decay: as in Adam, or if decoupled as in AdamW. With a sparse
            gradient, of either kind, it reaches only what arrived.
        maximize: ascend instead of descend.
        first_moment: how it is kept: "full" or "sketch".
        second_moment: "full", "cover", "factored" or "sketch". Vectors, scalars and tensors with
            fewer than min_compressed_numel elements keep full state: there is little to save.
        depth, size_ratio, width: of sketches; width, if given, instead of size_ratio (see
            optim.sketch). Rows are the parameter's first axis.
        seed: of the hashes; each parameter and moment gets its own from it and the parameter's
            position, so that ranks agree without talking. A checkpoint's hashes replace them.
        clean_factor, clean_interval: every so many steps of a parameter, multiply the sketch of its
            second moment, all of it, by the factor. None: never, the default also for sums, so that
            a sketch without collisions equals the full state (the paper: 0.2 and 125).

    State is float32 whatever the parameter's dtype, and is made when a parameter that requires a
    gradient is given, not in the first step: `broadcast_optimizer_state` of Horovod would else step
    with zero gradients. `step` in the state counts the steps in which a parameter had a gradient.
    A sparse gradient (COO) is coalesced. With one sparse dimension it is of rows, with as many as
    the parameter has it is of elements; only they are touched, and what their state shares with
    others (see kernels.ops.step).
    """

    first_follows_update: ClassVar[bool] = False
    structures: ClassVar[Mapping[str, str]] = {"first_moment": "full", "second_moment": "full"}

    def __init__(self, params: Any, defaults: Group) -> None:
        self._delegated: dict[Tensor, Preconditioner | None] = {}
        unset = {k: v for k, v in self.structures.items() if defaults.get(k, "") is None}
        super().__init__(params, {**defaults, **unset})

    def __getstate__(self) -> dict[str, Any]:
        delegated = dict.fromkeys(self._delegated)  # what they feed is not a copy's
        return {**super().__getstate__(), "_delegated": delegated}

    # ---- what a subclass says --------------------------------------------------------------------

    def _first(self, group: Group) -> tuple[str, str] | None:
        """Return the name and structure of the first moment; None if there is none."""
        return None

    def _second(self, group: Group) -> tuple[str, str] | None:
        return None

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        """Return those of kernels.ops.Rule that the moments need, in a parameter's step, from 1."""
        raise NotImplementedError

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        elements: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        """Update the parameters that have a gradient, and return the closure's loss.

        Args: elements: parameter -> (indices (k,) int64 into it flattened, ascending and unique;
            values (k,) float32): what has arrived of its gradient, instead of its .grad. Decoupled
            weight decay reaches all of the parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elements = dict(elements or {})
        arrived = [(place, read_gradient(place[2], elements.pop(place[2], None)))
                   for place in self._places()]  # fmt: skip
        if elements:
            shapes = [tuple(p.shape) for p in elements]
            raise ValueError(f"elements for tensors of shapes {shapes}, which are no parameters of "
                             "this optimizer")  # fmt: skip
        for place, gradient in arrived:
            if gradient is not None:
                self._step_parameter(*place, gradient)
        return loss

    def _step_parameter(self, position: int, group: Group, p: Tensor, gradient: Gradient) -> None:
        moments = self._moments(position, group, p)
        step = int(self.state[p]["step"]) + 1
        rule = self._rule(group, step)
        if gradient.indices is not None and not gradient.is_alone and rule.decay != 1:
            p.mul_(rule.decay)  # what has not arrived decays too
            rule.decay = 1.0
        if gradient.values.numel():
            self._launch(p, gradient, rule, moments)
        self.state[p]["step"] += 1
        if moments[1] is not None:
            moments[1].end_step(step, group)

    def _launch(
        self, p: Tensor, gradient: Gradient, rule: ops.Rule, moments: tuple[Moment | None, ...]
    ) -> None:
        """Run the kernel on the parameter as a matrix."""
        any_split = gradient.rows is None and all(m.any_split for m in moments if m)
        split = balanced_split(tuple(p.shape)) if any_split else 1
        shape = matrix_shape(tuple(p.shape), split)
        target = p.contiguous()
        matrix, values = target.view(shape), gradient.values.contiguous()
        first, second = (m and m.operand(split) for m in moments)
        if gradient.indices is None:
            values = values.view(-1, shape[1])
            ops.step(matrix, values, rule, first=first, second=second, rows=gradient.rows)
        else:
            ops.step_elements(matrix, values, gradient.indices, rule, first=first, second=second)
        for moment, operand in zip(moments, (first, second), strict=True):
            if moment is not None:
                moment.write_back(operand, split, is_dense=gradient.is_dense)
        if target.data_ptr() != p.data_ptr():
            p.copy_(target)
        torch.autograd.graph.increment_version(p)  # native kernels write behind autograd's back

    def _rule(self, group: Group, step: int) -> ops.Rule:
        lr, weight_decay = float(group["lr"]), group["weight_decay"]
        decay = {"weight_decay": weight_decay}
        if group["decoupled_weight_decay"]:
            decay = {"decay": 1 - lr * weight_decay}
        sign = -1.0 if group["maximize"] else 1.0
        return ops.Rule(lr, sign=sign, **decay, **self._scalars(group, step))

    # ---- the second moment, elsewhere ------------------------------------------------------------

    @property
    def has_first_moment(self) -> bool:
        return any(self._first(group) is not None for group in self.param_groups)

    @property
    def has_second_moment(self) -> bool:
        return any(self._second(group) is not None for group in self.param_groups)

    def delegate_second_moment(self, p: Tensor) -> Preconditioner | None:
        """Give up p's second moment: what arrives for p from now on is already divided by its root.

        Returns: the moment as it is here, from 0 if p has not been stepped, to be fed wherever the
            dense gradients are; None if there is none. A checkpoint that brings a moment for p
            (`load_state_dict`) brings it there. It reads its options here, so changes of
            `param_groups` reach it.
        Raises: ValueError, if p has weight decay that is not decoupled: within a gradient that
            waits it would be applied late, and scaled.
        """
        position, group = next((i, group) for i, group, q in self._places() if q is p)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"weight_decay is {group['weight_decay']} and acts within the gradient; with "
                f"gradients that wait, set decoupled_weight_decay=True"
            )
        if self._second(group) is None:
            return None
        state = {} if p in self._delegated else self.state[p]
        num_steps = state.get("step", torch.zeros((), dtype=torch.float32, device="cpu")).clone()
        moment = self._moment(position, group, p, state, _SECOND)
        for name in moment.tensors:
            state.pop(name)

        number = next(k for k, g in enumerate(self.param_groups) if g is group)

        def options() -> Group:  # loading a checkpoint replaces the groups
            return self.param_groups[number]

        given = Preconditioner(
            moment, lambda step: self._scalars(options(), step), options, num_steps
        )
        self._delegated[p] = given
        self._moments(position, group, p)  # the rest of its state, if that is not there yet
        return given

    def reclaim_second_moment(self, p: Tensor) -> None:
        """Own p's second moment again: as it was given, if it has not been fed since.

        If it has, all state of p begins anew, from 0 and step 0: what workers have fed differs
        between them, and beside a moment that begins at 0 the first moment and the bias corrections
        of a later step would make far too large an update.
        """
        if p not in self._delegated:
            return
        given = self._delegated.pop(p)
        if given is not None and not given.is_fed:
            self.state[p].update({k: t for k, t in given.tensors.items() if k != "step"})
            return
        self.state.pop(p, None)
        for position, group, q in self._places():
            if q is p:
                self._moments(position, group, p)

    # ---- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            options.check(self.param_groups[-1])
            for position, group, p in self._places():
                if group is self.param_groups[-1] and p.requires_grad:
                    self._moments(position, group, p)
        except ValueError:
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)
            raise

    def _places(self) -> Iterator[tuple[int, Group, Tensor]]:
        """Yield every parameter with its position in the optimizer and its group."""
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        return ((position, group, p) for position, (group, p) in enumerate(pairs))

    def _moments(
        self, position: int, group: Group, p: Tensor, *, as_layout: bool = False
    ) -> tuple[Moment | None, Moment | None]:
        """Return a parameter's moments, after making those parts of its state that are not there.

        Args: as_layout: make new ones, without memory and not in the state, to compare with.
        """
        check_parameter(p)
        state = {} if as_layout else self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros(())
        device = torch.device("meta") if as_layout else p.device
        first = self._moment(position, group, p, state, _FIRST, device)
        if p in self._delegated:
            return first, None
        return first, self._moment(position, group, p, state, _SECOND, device)

    def _moment(
        self,
        position: int,
        group: Group,
        p: Tensor,
        state: dict[str, Tensor],
        turn: int,
        device: torch.device | None = None,
    ) -> Moment | None:
        chosen = (self._first, self._second)[turn](group)
        if chosen is None:
            return None
        is_small = p.dim() < 2 or p.numel() < group["min_compressed_numel"] or p.numel() == 0
        spec = Spec(
            name=chosen[0],
            shape=tuple(p.shape),
            device=device or p.device,
            is_first=turn == _FIRST,
            follows_update=turn == _FIRST and self.first_follows_update,
            seed_key=(group.get("seed", 0), position, turn),
            options=group,
        )
        return STRUCTURES["full" if is_small else chosen[1]](spec, state)

    def estimate(self, p: Tensor) -> Tensor:
        """Return the second moment of each element as it is kept: before bias correction.

        It takes the full size in float32: for tests and benchmarks.
        """
        for position, group, parameter in self._places():
            second = self._moments(position, group, p)[1] if parameter is p else None
            if second is not None:
                return second.estimate()
        raise ValueError("not a parameter of this optimizer, or one without a second moment")

    @property
    def num_bytes(self) -> int:
        """Bytes of all state."""
        return sum(self.state_bytes().values())

    def state_bytes(self) -> dict[str, int]:
        """Return each parameter's bytes of state, by its name, or its position if it has none."""
        named = [group.get("param_names", [None] * len(group["params"]))
                 for group in self.param_groups]  # fmt: skip
        names = chain.from_iterable(named)
        return {
            name or str(position): sum(t.nbytes for t in self.state.get(p, {}).values())
            for name, (position, _, p) in zip(names, self._places(), strict=True)
        }

    # ---- checkpoints -----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's options and a copy of its state, in float32.

        torch's own would cast the state to the parameter's dtype (pytorch issue 43706), share
        tensors with `state_dict`, and take any shape. Seeds and `step` stay on the CPU.
        A delegated second moment that was saved by an optimizer that had not delegated it goes to
        whom it is delegated.
        Raises: ValueError, before anything changes, if a parameter's state was kept otherwise.
        """
        fitted: dict[Tensor, dict[str, Tensor]] = {}

        def take(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = [
                {**{k: v for k, v in mine.items() if k != "params"}, **theirs}
                for mine, theirs in zip(self.param_groups, loaded["param_groups"], strict=False)
            ]
            groups += loaded["param_groups"][len(groups) :]  # which torch will refuse
            for group in groups:
                options.check(group)
            fitted.update(self._fit(loaded))
            return {**loaded, "state": {}, "param_groups": groups}

        def put(_: Optimizer) -> None:
            for p, state in fitted.items():
                if (given := self._delegated.get(p)) is not None:
                    given.take_out_of(state)
            self.state.update(fitted)
            for position, group, p in self._places():
                if p.requires_grad:
                    self._moments(position, group, p)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _fit(self, loaded: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Return copies of the loaded tensors for each parameter, once all are known to fit."""
        keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        fitted = {}
        for key, (position, group, p) in zip(keys, self._places(), strict=False):
            theirs = loaded["state"].get(key)
            if theirs:
                layout: dict[str, Tensor] = {"step": torch.zeros(())}
                first, second = self._moments(position, group, p, as_layout=True)
                layout.update(first.tensors if first else {})
                if second and theirs.keys() == layout.keys():
                    raise ValueError(
                        f"the checkpoint has no second moment for parameter {position}: it was "
                        f"saved while workers of a DistributedOptimizer had that. Make the "
                        f"DistributedOptimizer first, and load the checkpoint there"
                    )
                layout.update(second.tensors if second else {})
                given = self._delegated.get(p)
                if given is not None and theirs.keys() & given.tensors.keys() > {"step"}:
                    layout |= given.tensors
                fitted[p] = fit_state(position, layout, theirs, p.device)
        return fitted
