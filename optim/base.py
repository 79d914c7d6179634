"""MomentOptimizer: the torch.optim.Optimizer of which all optimizers here are subclasses.

It makes a step of dense, row-sparse or element-sparse gradients, and can give a second moment to
somebody who sees all gradients. state.py has its options, state and checkpoints. A subclass says
which moments there are and gives the numbers of its rule; moments.py keeps each moment in its
structure; parsimony_kernels.step.ops does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optim import options, plans
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
        lr: a float or a tensor. A tensor on a GPU makes every step wait for the GPU.
        weight_decay, decoupled_weight_decay: as in Adam; if decoupled, as in AdamW. With a sparse
            gradient, only the rows or elements that arrived have weight decay.
        maximize: ascend instead of descend.
        first_moment: the structure in which it is kept: "full" or "sketch".
        second_moment: "full", "cover", "factored" or "sketch". Vectors, scalars and tensors with
            fewer than min_compressed_numel elements keep full state: there is little to save.
        depth, size_ratio, width: the size of sketches; width replaces size_ratio if it is given
            (see optim.sketch). The rows of a sketch are the parameter's first axis.
        seed: of the sketches' hashes. Each moment of each parameter gets its own hashes from this
            seed and the parameter's position, so that all ranks have the same ones. Loading a
            checkpoint replaces them by the checkpoint's.
        clean_factor, clean_interval: after every clean_interval steps of a parameter, the whole
            sketch of its second moment is multiplied by clean_factor. The default, None, is never,
            for sums too, so that a sketch without collisions equals full state (the paper has 0.2
            and 125).
        amsgrad, foreach, ...: keywords of torch (options.NEUTRAL), for scripts that name them; only
            the values that change nothing are allowed.

    State is float64 for float64 parameters and float32 for all others. It is made when a parameter
    that requires a gradient is added, not in its first step: otherwise
    `broadcast_optimizer_state` of Horovod would make a step with zero gradients to have it made.
    Only for an uninitialized parameter, of a lazy module, it is made in the first step, when its
    shape is known. There is a first moment while betas[0], or momentum, is above 0: a schedule that
    sets it to 0 drops the moment, and when it rises again the moment begins at 0.
    `step` in the state counts the steps in which the parameter had a gradient.
    A sparse gradient (COO) is coalesced. With one sparse dimension it is a gradient of rows; with
    as many as the parameter has, of elements. Only those rows or elements are changed, and the
    state that they share with others (see parsimony_kernels.step.ops.step).
    """

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        """Return the fields of ops.Rule that the moments need in a parameter's `step`-th step."""
        raise NotImplementedError

    # ---- a step ----------------------------------------------------------------------------------

    @torch.compiler.disable  # when compiled, it counts the steps of one parameter only
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        elements: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        """Update the parameters that have a gradient, and return the closure's loss.

        Args:   elements: parameter -> (indices (k,), values (k,)): the elements of its gradient
                    that arrived, which take the place of its .grad; its other elements are 0. The
                    indices are int64 into the flattened parameter, ascending and unique; the values
                    are float64 for a float64 parameter, else float32. Decoupled weight decay acts
                    on the whole parameter. Whether the indices are so is checked, for which a GPU
                    is waited for, unless they are trusted (runtime.checks.trusted_positions).
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
        planned, others = self._planned(elements)
        arrived = [(one, read_gradient(one[2], elements.pop(one[2], None))) for one in others]
        if elements:
            shapes = [tuple(p.shape) for p in elements]
            raise ValueError(f"elements for tensors of shapes {shapes}, which are no parameters of "
                             "this optimizer")  # fmt: skip
        ready = [(one, gradient, self._moments(*one))
                 for one, gradient in arrived if gradient is not None]  # fmt: skip
        plans.run(planned, self._rule)  # only these can be refused yet
        for (_, group, p), gradient, moments in ready:
            self._step_parameter(group, p, gradient, moments)
        return loss

    def _planned(
        self, elements: dict[Tensor, tuple[Tensor, Tensor]]
    ) -> tuple[list[plans.Arrived], list[tuple[int, Group, Tensor]]]:
        """Return what arrived for the plans that hold, and the other parameters.

        What is returned is taken out of `elements`.
        """
        planned, others = [], []
        structures = {id(group): self._structure(group) for group in self.param_groups}
        known = self._plans if ops.implementation() == "native" else {}
        for position, group, p in self._parameters():
            plan, grad, pair = known.get(p), p.grad, elements.get(p) if elements else None
            has_come = (grad is None) != (pair is None)  # else there is nothing, or too much
            if plan is not None and has_come:
                if not plan.holds(group, structures[id(group)], self.state[p]):
                    del known[p]
                elif arrived := plan.arrived(grad, pair):
                    planned.append(arrived)
                    if pair is not None:
                        del elements[p]
                    continue
            others.append((position, group, p))
        return planned, others

    def _structure(self, group: Group) -> tuple[Any, ...]:
        """Return what decides in which structures a group's moments are kept."""
        return (
            self._first(group), self._second(group), group["min_compressed_numel"],
            group.get("variant"),
        )  # fmt: skip

    def _step_parameter(
        self, group: Group, p: Tensor, gradient: Gradient, moments: tuple[Moment | None, ...]
    ) -> None:
        state = self.state[p]
        step = int(state["step"]) + 1
        rule = self._rule(group, step)
        if gradient.indices is not None and not gradient.rest_is_unknown:
            if (scale := rule.scalars(p.dtype).param_scale) != 1:
                p.mul_(scale)  # weight decay acts on the elements that did not arrive, too
                rule = rule.replace(param_scale=1.0)
        if gradient.values.numel():
            update(p, gradient, rule, moments)
        state["step"] += 1
        if moments[1] is not None:
            moments[1].end_step(step, group)
        if p not in self._plans and ops.implementation() == "native":
            self._plans[p] = plans.plan(p, group, self._structure(group), state, moments)

    def _rule(self, group: Group, step: int) -> ops.Rule:
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        decay = {"weight_decay": weight_decay}
        if group["decoupled_weight_decay"]:
            decay = {"param_scale": 1 - lr * weight_decay}
        sign = -1.0 if group["maximize"] else 1.0
        return ops.Rule(lr, sign=sign, **decay, **self._scalars(group, step))

    # ---- second moments that somebody else feeds -------------------------------------------------

    @property
    def has_first_moment(self) -> bool:
        return any(self._first(group) is not None for group in self.param_groups)

    @property
    def has_second_moment(self) -> bool:
        return any(self._second(group) is not None for group in self.param_groups)

    def delegate_second_moment(self, p: Tensor) -> Preconditioner | None:
        """Give p's second moment away, to be fed by somebody who sees the dense gradients.

        From now on a step takes gradients of p that are divided by the moment's root already.
        Returns: the moment in its present state, 0 if p has not been stepped; None if p has none.
            When `load_state_dict` finds a second moment for p, it loads it into this one. Changes
            of the options in `param_groups` act on it.
        Raises: ValueError, if p has no shape yet, or if its weight decay is not decoupled: it would
            be part of a gradient that waits in a residual, and would act late and scaled.
        """
        if is_lazy(p):
            raise ValueError("the parameter is uninitialized, so the size of its second moment is "
                             "not known; call the lazy module once before")  # fmt: skip
        position, group = next((i, group) for i, group, q in self._parameters() if q is p)
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

        def current() -> Group:  # not `group` itself: loading a checkpoint replaces the groups
            return self.param_groups[number]

        given = Preconditioner(
            moment, lambda step: self._scalars(current(), step), current, num_steps
        )
        self._delegated[p] = given
        self._moments(position, group, p)  # makes the rest of p's state, if it is not there yet
        return given

    def reclaim_second_moment(self, p: Tensor) -> None:
        """Take p's second moment back, as it was when it was given away, if nobody has fed it.

        If it has been fed, all state of p begins anew at 0 and step 0. The fed moments differ
        between workers, so none of them can be taken over; and if only the second moment began
        anew, the old first moment and the bias correction of a late step would make the next
        update far too large.
        """
        if p not in self._delegated:
            return
        given = self._delegated.pop(p)
        if given is not None and not given.is_fed:
            self.state[p].update({k: t for k, t in given.tensors.items() if k != "step"})
            return
        self.state.pop(p, None)
        for position, group, q in self._parameters():
            if q is p:
                self._moments(position, group, p)
