"""Train a contender step by step, on fake tensors or on real ones, while a tracker watches.

The steps are those of engine.loop: micro-batches of forward and backward, the exchange, the
optimizer's step, and then gradients are freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dgc import DistributedOptimizer, row_sparse_names
from dgc.optimizer.hooks.handed_over import HandedOver
from memory import tracker as kinds
from memory.answers import UNANSWERED, Answers
from memory.job import Contender, Job
from memory.one_of_many import OneOfMany
from memory.tracker import Tracker

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
STATE = "state: "  # begins the kinds of optimizer state


class Rehearsal:
    """One rank's model, optimizer and exchange, followed by a tracker.

    Args: answers: answer for fake tensors; None: tensors are real. fake: the fake mode, which the
        caller has entered; None: tensors are real.
    """

    def __init__(
        self,
        job: Job,
        contender: Contender,
        tracker: Tracker,
        *,
        answers: Answers | None = None,
        fake: FakeTensorMode | None = None,
    ) -> None:
        self.job, self.contender, self.tracker, self._answers = job, contender, tracker, answers
        self._in_exchange: contextlib.ExitStack | None = None
        self.kept_by_tensor: dict[str, dict[str, int]] = {}
        self.note = ""
        with torch.device(job.device) if job.device.type != "cpu" else contextlib.nullcontext():
            self.model = _build(job.make_model, fake)
        self.model.train()
        if not contender.takes_rows and (names := row_sparse_names(self.model)):
            self.note = f"dense gradients of {', '.join(names)}"
            _make_dense(self.model)
        tracker.label(kinds.PARAMETERS, self.model.parameters())
        tracker.label(kinds.BUFFERS, self.model.buffers())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._hook(parameters, self._before_exchange)
        with self._steady(0):  # of what is asked here, the number of steps made: 0
            self.optimizer = self._make_optimizer()
        self._hook(parameters, self._after_exchange)
        self._carried: Any = None
        self._averaged = [p.detach().clone() for p in parameters] if job.is_averaged else []
        tracker.label("averaged parameters", self._averaged)
        self._label_state()

    def step(self, batches: Sequence[Callable[[], Sequence[Tensor]]]) -> kinds.Moment:
        """Make one step; return what is alive at its end, before gradients are freed.

        Args: batches: a function for each micro-batch, which makes its tensors on the job's device.
        """
        before = [buffer.clone() for buffer in self.model.buffers()]  # as for a step to be undone
        self.tracker.label(kinds.BUFFERS, before)
        for make_batch in batches:
            batch = make_batch()
            self.tracker.label(kinds.INPUTS, batch)
            loss = self._forward(batch)
            with self.tracker.phase(BACKWARD):
                loss.backward()
        with self._steady(), self.tracker.phase(STEP, kinds.EXCHANGE):
            if self.contender.exchanges:
                self.optimizer.synchronize()
            self.tracker.label(kinds.GRADIENTS, self._gradients())
        with self._steady(), torch.no_grad(), self.tracker.phase(STEP):
            self.optimizer.step()
            for mine, p in zip(self._averaged, self.model.parameters(), strict=False):
                mine.lerp_(p, 0.01)
            self._label_state()
        kept = self.tracker.now()
        self.kept_by_tensor = {
            name: {kind: sum(map(_num_bytes, tensors)) for kind, tensors in parts.items()}
            for name, parts in self.state_by_tensor().items()
        }
        self.optimizer.zero_grad()
        return kept

    def _forward(self, batch: Sequence[Tensor]) -> Tensor:
        if self._answers is not None:
            self._answers.begin()
        with self.tracker.phase(FORWARD):
            self.tracker.mark()
            with self.job.autocast():
                loss, _, self._carried = self.job.task(self.model, batch, self._carried)
            loss = loss / self.job.micro_batches
            self.tracker.label(kinds.CARRIED, torch.utils._pytree.tree_leaves(self._carried))
            self.tracker.label_new(kinds.ACTIVATIONS)
        return loss

    # ---- the exchange ----------------------------------------------------------------------------

    def _make_optimizer(self) -> Any:
        job, contender = self.job, self.contender
        optimizer = contender.optimizer(job.param_groups(self.model))
        if type(optimizer).__module__.startswith("torch.optim"):
            for group in optimizer.param_groups:  # foreach by default, but not for fake tensors
                if job.device.type == "cuda" and "foreach" in group and not group.get("fused"):
                    group["foreach"] = group["foreach"] is not False
        if not contender.exchanges:
            return optimizer
        distributed = DistributedOptimizer(
            optimizer, self.model.named_parameters(),
            comm=OneOfMany(job.world_size, job.ranks_per_node), compression=contender.compression,
            micro_batches_per_step=job.micro_batches, bucket_bytes=job.bucket_bytes,
            row_sparse=row_sparse_names(self.model),
        )  # fmt: skip
        if contender.compression is not None:
            distributed.set_density(job.density or contender.compression.density)
        return distributed

    def _hook(self, parameters: Sequence[Tensor], hook: Callable[[Tensor], None]) -> None:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(hook)

    def _before_exchange(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if isinstance(grad, HandedOver):  # a placeholder for the last micro-batch's gradient
            grad = grad.added
        self.tracker.label(kinds.GRADIENTS, [grad])
        self._in_exchange = contextlib.ExitStack()
        self._in_exchange.enter_context(self._steady())
        self._in_exchange.enter_context(self.tracker.phase(BACKWARD, kinds.EXCHANGE))

    def _after_exchange(self, parameter: Tensor) -> None:
        self._in_exchange.close()

    def _steady(self, number: int = 1) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._answers is None else self._answers.steady(number)

    # ---- what is kept ----------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _label_state(self) -> None:
        for parts in self.state_by_tensor().values():
            for kind, tensors in parts.items():
                if kind not in (kinds.PARAMETERS, kinds.GRADIENTS):
                    self.tracker.label(_joined(kind), tensors)

    def state_by_tensor(self) -> dict[str, dict[str, list[Tensor]]]:
        """Return parameter -> kind -> the tensors of this kind that are kept for it."""
        worker = self._worker_state()
        state = self.optimizer.state
        found: dict[str, dict[str, list[Tensor]]] = {}
        for name, parameter in self.model.named_parameters():
            parts = {kinds.PARAMETERS: [parameter]}
            if parameter.grad is not None:
                parts[kinds.GRADIENTS] = [parameter.grad]
            for kind, by_name in worker.items():
                if name in by_name:
                    parts[kind] = by_name[name]
            for key, value in state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    parts[STATE + key] = [value]
            found[name] = parts
        return found

    def _worker_state(self) -> dict[str, dict[str, list[Tensor]]]:
        if not self.contender.exchanges:
            return {}
        state = self.optimizer.worker_state_dict()
        every = {kind: state["compensation"][kind] for kind in ("residual", "velocity")}
        every["statistics"] = state["statistics"]
        return {
            kind: {
                name: list(value.values()) if isinstance(value, dict) else [value]
                for name, value in by_name.items()
            }
            for kind, by_name in every.items()
        }


def _joined(kind: str) -> str:
    """Return a kind without the number at its end: accumulator_0, accumulator_1 -> accumulator."""
    stem, _, number = kind.rpartition("_")
    return stem if number.isdigit() else kind


def _num_bytes(tensor: Tensor) -> int:
    return sum(part.nbytes for part in kinds.parts_of(tensor))


def _make_dense(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "sparse", False) is True:
            module.sparse = False


def _build(make_model: Callable[[], nn.Module], fake: FakeTensorMode | None) -> nn.Module:
    """Build the model; if that asks fake tensors for values, build it for real and convert it."""
    try:
        return make_model()
    except UNANSWERED:
        if fake is None:
            raise
    with torch.utils._python_dispatch._disable_current_modes():
        model = make_model()
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                store[name] = None if tensor is None else fake.from_tensor(tensor)
    return model
