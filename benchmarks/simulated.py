"""The tasks that compressed_training.py trains; their data lie in memory.

Each worker draws its own samples. The workers' batches together, the joined batch, have the same
number of samples for any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.words import BPTT, WordModel, perplexity, read_corpus
from engine.meters import smaller_is_better
from workloads.datasets import cifar10, digits
from workloads.models import SmallImageResNet

Backward = Callable[[nn.Module], float]  # runs forward and backward, returns the loss


class Task(Protocol):
    quality: str
    """What `evaluate` returns: accuracy is better larger, perplexity smaller."""
    clip_norm: float | None
    num_steps: int

    def make_model(self) -> nn.Module: ...
    def batches(self, rank: int, world_size: int, seed: int) -> Iterator[Backward]: ...
    def evaluate(self, model: nn.Module, *, is_final: bool) -> float: ...


class Images:
    """Classification of small images, (n, channels, height, width), with their labels."""

    quality, clip_norm = "accuracy", None

    def __init__(
        self,
        data: dict[str, tuple[Tensor, Tensor]],
        make_model: Callable[[], nn.Module],
        joined_batch: int,
        num_steps: int,
        shift: int = 0,
    ) -> None:
        self.data, self.make_model, self.joined_batch = data, make_model, joined_batch
        self.num_steps, self.shift = num_steps, shift

    def batches(self, rank: int, world_size: int, seed: int) -> Iterator[Backward]:
        """Yield batches of images drawn at random, shifted and flipped if the task does that."""
        images, labels = self.data["train"]
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        size = self.joined_batch // world_size
        while True:
            chosen = torch.randint(len(images), (size,), generator=generator)
            inputs = self._augment(images[chosen], generator)
            yield lambda model, x=inputs, y=labels[chosen]: _backward(
                nn.functional.cross_entropy(model(x), y)
            )

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if not self.shift:
            return images
        size, width = len(images), images.shape[-1]
        padded = nn.functional.pad(images, [self.shift] * 4)
        offsets = torch.randint(2 * self.shift + 1, (2, size, 1), generator=generator)
        rows, columns = offsets + torch.arange(width)
        flips = torch.rand(size, 1, generator=generator) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
        numbers = torch.arange(size)[:, None, None]
        return padded[numbers, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, is_final: bool) -> float:
        images, labels = self.data["test"]
        if not is_final:
            images, labels = images[:1000], labels[:1000]
        model.eval()
        parts = zip(images.split(500), labels.split(500), strict=True)
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
        model.train()
        return 100 * correct / len(images)


class Words:
    """The word language model of words.py without dropout. Each worker reads its own columns of one
    text."""

    quality, clip_norm, joined_batch = "perplexity", 1.0, 20

    def __init__(self, folder: Path, num_words: int, width: int, num_steps: int) -> None:
        self.corpus = read_corpus(folder, num_words)
        self.width, self.num_steps = width, num_steps

    def make_model(self) -> nn.Module:
        return WordModel(self.corpus, self.width, dropout=0.0)

    def batches(self, rank: int, world_size: int, seed: int) -> Iterator[Backward]:
        text, count = self.corpus.train, self.joined_batch
        num_rows = len(text) // count
        columns = text[: num_rows * count].view(count, num_rows).t()
        mine = columns[:, rank * count // world_size : (rank + 1) * count // world_size]
        hidden: Any = None
        start = (seed * 7919) % (num_rows // 2) // BPTT * BPTT

        def backward(model: nn.Module) -> float:
            nonlocal hidden
            rows = slice(start, start + BPTT), slice(start + 1, start + BPTT + 1)
            loss, hidden = model.loss(*(mine[part].contiguous() for part in rows), hidden)
            return _backward(loss)

        while True:
            yield backward
            start += BPTT
            if start + BPTT + 1 > num_rows:
                start, hidden = 0, None

    def evaluate(self, model: nn.Module, *, is_final: bool) -> float:
        text = self.corpus.test if is_final else self.corpus.valid[:14_000]
        return perplexity(model, text, self.joined_batch)


def _backward(loss: Tensor) -> float:
    loss.backward()
    return float(loss.detach())


def read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    return {split: dataset.tensors for split, dataset in digits().items()}


def read_cifar10(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the images, normalized; keep them in a file beside the folder, for the next time."""
    kept = folder.with_suffix(".pt")
    if not kept.exists():
        splits: dict[str, tuple[Tensor, Tensor]] = {}
        for split, dataset in cifar10(str(folder), download=False).items():
            dataset.transform = None
            pairs = [(torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8), y)
                     for x, y in dataset]  # fmt: skip
            images = torch.stack([x for x, _ in pairs]).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
            splits[split] = images.contiguous(), torch.tensor([y for _, y in pairs])
        torch.save(splits, kept)
    data = torch.load(kept)
    mean = data["train"][0].float().mean((0, 2, 3), keepdim=True)
    std = data["train"][0].float().std((0, 2, 3), keepdim=True)
    return {split: ((x.float() - mean) / std, y) for split, (x, y) in data.items()}


def halved(data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the images at half their height and width."""
    return {split: (nn.functional.avg_pool2d(x, 2), y) for split, (x, y) in data.items()}


def small_net() -> nn.Module:
    return SmallImageResNet(1, in_channels=1)


def resnet20() -> nn.Module:
    return SmallImageResNet(3)


def wide_resnet20() -> nn.Module:
    return SmallImageResNet(3, width=48)


def make_task(name: str, data: Path, num_steps: int | None) -> Task:
    """Return a task by name; num_steps: None: the task's own number."""
    if name == "digits":
        return Images(read_digits(), small_net, 128, num_steps or 400)
    if name == "cifar":
        return Images(read_cifar10(data / "cifar10"), resnet20, 64, num_steps or 400, shift=4)
    if name == "cifar-wide":
        data = halved(read_cifar10(data / "cifar10"))
        return Images(data, wide_resnet20, 64, num_steps or 400, shift=2)
    if name == "words":
        return Words(data / "wikitext-2", 4000, 128, num_steps or 400)
    raise ValueError(f"task {name!r}; allowed: {', '.join(TASKS)}")


TASKS = ("digits", "cifar", "cifar-wide", "words")


def is_better(quality: str, one: float, other: float) -> bool:
    if not math.isfinite(other):
        return math.isfinite(one)
    return one < other if smaller_is_better(quality) else one > other
