"""MomentOptimizer: a torch.optim.Optimizer of a first and a second moment, each kept somehow.

Owns: a step, of what arrives: dense, row-sparse or element-sparse. state.py owns options, state and
checkpoints. A subclass says which moments there are and the scalars of the rule; moments.py how
each is kept; parsimony_kernels.step.ops does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optim import options
from optim.gradients import Gradient, read_gradient
from optim.moments import Moment, count_of_steps
from optim.preconditioner import Preconditioner
from optim.state import SECOND, Group, StatefulOptimizer
from optim.update import refuse_capture, update
from parsimony_kernels.step import ops

__all__ = ["Group", "MomentOptimizer"]


class MomentOptimizer(StatefulOptimizer):
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
        amsgrad, foreach, ...: torch's (options.NEUTRAL), for scripts that name them; only values
            that ask for nothing are allowed.

    State is float32 whatever the parameter's dtype, but float64 for float64, and is made when a
    parameter that requires a gradient is given, not in the first step (`broadcast_optimizer_state`
    of Horovod would else step with zero gradients); that of an uninitialized parameter (of a lazy
    module) in its first step, when its shape is known. A first moment is there while betas[0], or
    momentum, is above 0: a schedule that takes it to 0 ends it, and later it begins at 0 again.
    `step` in the state counts the steps in which a parameter had a gradient. A sparse gradient
    (COO) is coalesced. With one sparse dimension it is of rows, with as many as the parameter has
    it is of elements; only they are touched, and what their state shares with others (see
    parsimony_kernels.step.ops.step).
    """

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        """Return those of a kernels' Rule that the moments need, in a parameter's step, from 1."""
        raise NotImplementedError

    # ---- a step ----------------------------------------------------------------------------------

    @torch.compiler.disable  # compiled, it would count steps for one parameter only
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        elements: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        """Update the parameters that have a gradient, and return the closure's loss.

        Args: elements: parameter -> (indices (k,) int64 into it flattened, ascending and unique;
            values (k,), float32, or float64 of a float64 parameter): what has arrived of its
            gradient, instead of its .grad. Decoupled weight decay reaches all of the parameter.
        Raises: RuntimeError, while a CUDA graph is captured.
        """
        refuse_capture()
        for group in self.param_groups:
            options.check_neutral(group)
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
        ready = [(place, gradient, self._moments(*place))
                 for place, gradient in arrived if gradient is not None]  # fmt: skip
        for (_, group, p), gradient, moments in ready:  # now that nothing is refused any more
            self._step_parameter(group, p, gradient, moments)
        return loss

    def _step_parameter(
        self, group: Group, p: Tensor, gradient: Gradient, moments: tuple[Moment | None, ...]
    ) -> None:
        state = self.state[p]
        step = int(state["step"]) + 1
        rule = self._rule(group, step)
        if gradient.indices is not None and not gradient.is_alone:
            if (decay := rule.scalars(p.dtype).decay) != 1:
                p.mul_(decay)  # what has not arrived decays too
                rule = rule.replace(decay=1.0)
        if gradient.values.numel():
            update(p, gradient, rule, moments)
        state["step"] += 1
        if moments[1] is not None:
            moments[1].end_step(step, group)

    def _rule(self, group: Group, step: int) -> ops.Rule:
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
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
        Raises: ValueError, if p has no shape yet, or has weight decay that is not decoupled: within
            a gradient that waits it would be applied late, and scaled.
        """
        if is_lazy(p):
            raise ValueError("the parameter is uninitialized, so the size of its second moment is "
                             "not known; call the lazy module once before")  # fmt: skip
        position, group = next((i, group) for i, group, q in self._places() if q is p)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"weight_decay is {group['weight_decay']} and acts within the gradient; with "
                f"gradients that wait, set decoupled_weight_decay=True"
            )
        if self._second(group) is None:
            return None
        if p in self._unfitted:
            self._moments(position, group, p)
        state = {} if p in self._delegated else self.state[p]
        num_steps = state.get("step", count_of_steps()).clone()
        moment = self._moment(position, group, p, state, SECOND)
        for name in moment.tensors:
            state.pop(name)

        number = next(k for k, g in enumerate(self.param_groups) if g is group)

        def current() -> Group:  # loading a checkpoint replaces the groups
            return self.param_groups[number]

        given = Preconditioner(
            moment, lambda step: self._scalars(current(), step), current, num_steps
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
