"""What a bucket asks of its device before it can go on: all that the host ever waits for.

A way (protocols.py) yields a question as it yields a collective, and is sent the answer. Of CPU
tensors the answer is there at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from parsimony_kernels.runtime.transfer import Download


class Question:
    """Some numbers on a device, which come to the host in one copy.

    Args: parts: tensors of one dtype on one device. is_last: a bucket neither sends nor asks
        anything after it. Such questions of all buckets are answered together, when all of them
        have arrived; others are on their way at once.
    """

    def __init__(self, parts: Sequence[Tensor], is_last: bool = False) -> None:
        self.parts, self.is_last = list(parts), is_last
        self._download: Download | None = None
        self._answer: list[Tensor] | None = None
        if all(part.device.type == "cpu" for part in self.parts):
            self._answer = self.parts
        elif not is_last:
            self._download = Download(_joined(self.parts))

    def poll(self) -> bool:
        """Tell whether `wait` would return at once."""
        if self._download is not None:
            return self._download.has_come()
        return self._answer is not None

    def wait(self) -> list[Tensor]:
        """Return the parts on the CPU."""
        if self._answer is None and self._download is None:
            answer_together([self])
        elif self._answer is None:
            self._answer = _split(self._download.wait(), self.parts)
        return self._answer


def answer_together(questions: Iterable[Question]) -> None:
    """Answer all these, with one wait for each device."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Question]] = {}
    for question in questions:
        if not question.poll():
            part = question.parts[0]
            by_kind.setdefault((part.device, part.dtype), []).append(question)
    downloads = [Download(_joined([p for q in qs for p in q.parts])) for qs in by_kind.values()]
    for asked, download in zip(by_kind.values(), downloads, strict=True):
        answers = iter(_split(download.wait(), [p for q in asked for p in q.parts]))
        for question in asked:
            question._answer = [next(answers) for _ in question.parts]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _split(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = joined.split([part.numel() for part in like])
    return [part.view(old.shape) for part, old in zip(parts, like, strict=True)]


def of_floats(numbers: Tensor) -> Tensor:
    """Return floats as int64, so that they can be asked together with others; see `to_floats`."""
    return numbers.to(torch.float64).view(torch.int64)


def to_floats(answer: Tensor) -> list[float]:
    return answer.view(torch.float64).tolist()
