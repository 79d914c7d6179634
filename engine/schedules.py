"""The learning rate over a run: a linear warm-up step by step, then any torch scheduler.

Source of the warm-up and of the scaling by workers: Goyal et al. 2017 (arXiv:1706.02677).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau

from engine.filling import asked, fill_in

_LENGTH_NAMES = ("T_max", "total_iters", "total_steps")  # schedulers' names for a run's length


class LearningRate:
    """Sets the rate of an optimizer, once a training step.

    Args:
        optimizer: has the rates for one micro-batch on one rank; they are multiplied by `scale`.
        scale: the number of micro-batches of the global batch, or 1 for no scaling.
        warmup_steps: over these steps the rate rises from lr to lr * scale.
        make_scheduler: makes a scheduler of the optimizer; None: constant after the warm-up.
        total_steps, steps_per_epoch: steps of the run, and of one epoch.
        per: "epoch" or "step": how often the scheduler moves, after the end of the warm-up.
        smaller_is_better: tells a ReduceLROnPlateau whether to look for the minimum of the metric.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scale: float,
        warmup_steps: int,
        make_scheduler: Callable[..., LRScheduler] | None,
        total_steps: int,
        steps_per_epoch: int,
        per: str,
        smaller_is_better: bool = False,
    ) -> None:
        self._num_steps = 0
        self._warmup_steps = min(warmup_steps, total_steps)
        self._stride = steps_per_epoch if per == "epoch" else 1
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale  # not in place: groups may share one lr tensor
        self._warmup_epochs = warmup_steps / steps_per_epoch
        self._scheduler, self._is_fitted = None, False
        if make_scheduler is not None:
            if scale != 1 and "max_lr" in getattr(make_scheduler, "keywords", {}):
                raise ValueError(
                    "a scheduler's max_lr is not multiplied by the workers; set "
                    "configs.train.scale_lr_by_workers and lr_warmup_epochs to False and 0"
                )
            length = max(1, (total_steps - self._warmup_steps) // self._stride)
            offered = dict.fromkeys(_LENGTH_NAMES, length)
            self._is_fitted = not offered.keys().isdisjoint(asked(make_scheduler))
            if getattr(make_scheduler, "func", make_scheduler) is ReduceLROnPlateau:
                offered["mode"] = "min" if smaller_is_better else "max"
            self._scheduler = fill_in(make_scheduler, offered)(optimizer)
        self._is_plateau = isinstance(self._scheduler, ReduceLROnPlateau)
        if self._is_plateau and per == "step":
            raise ValueError(
                "ReduceLROnPlateau looks at the metric of an evaluation; set "
                "configs.train.schedule_lr_per to epoch"
            )
        self._warmup = None
        if self._warmup_steps and scale != 1:
            self._warmup = LinearLR(optimizer, 1 / scale, total_iters=self._warmup_steps)
        self._optimizer, self._scale = optimizer, scale
        self._first_settings = [_settings(group) for group in optimizer.param_groups]

    def step(self) -> None:
        """Move to the next training step's rate. Call after the optimizer's step."""
        self._num_steps += 1
        if self._num_steps <= self._warmup_steps:
            if self._warmup is not None:
                self._warmup.step()
        elif self._scheduler is None or self._is_plateau:
            return
        elif (self._num_steps - self._warmup_steps) % self._stride == 0:
            self._scheduler.step()

    def depends_on_length(self, num_epochs: int) -> bool:
        """Tell whether rates would have been others in a run of so many epochs."""
        return self._is_fitted or self._warmup_epochs > num_epochs

    def end_epoch(self, metric: float) -> None:
        """Give a ReduceLROnPlateau the epoch's metric, which must be equal on all ranks."""
        if self._is_plateau and self._num_steps > self._warmup_steps:
            self._scheduler.step(metric)

    def state_dict(self) -> dict[str, Any]:
        parts = {"warmup": self._warmup, "scheduler": self._scheduler}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {"num_steps": self._num_steps, "scale": self._scale, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved position. The rates are in the optimizer's state: load that too."""
        self._num_steps = state["num_steps"]
        if self._warmup is not None:
            self._warmup.load_state_dict(state["warmup"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])

    def take_over(self, state: dict[str, Any], num_steps: int) -> None:
        """Go on in a run that was saved with another scale, or other lengths, of its steps.

        The rate becomes what it would be after num_steps of this run from its start. Where it
        depends on metrics (ReduceLROnPlateau) it is the saved one, scaled as here.
        Call after the optimizer's state has been loaded.
        """
        saved = [group["lr"] for group in self._optimizer.param_groups]
        for group, settings in zip(self._optimizer.param_groups, self._first_settings, strict=True):
            group.update(copy.deepcopy(settings))
        with warnings.catch_warnings():  # torch's: no step of the optimizer came before
            warnings.simplefilter("ignore")
            for _ in range(num_steps):
                self.step()
        if self._is_plateau:
            self._scheduler.load_state_dict(state["scheduler"])
            if num_steps > self._warmup_steps:
                ratio = self._scale / state.get("scale", self._scale)
                for group, lr in zip(self._optimizer.param_groups, saved, strict=True):
                    group["lr"] = lr * ratio


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in group.items() if name != "params"})
