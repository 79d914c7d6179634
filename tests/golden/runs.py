"""Run by record.py on one rank or several: three short trainings, whose losses are written as hex.

argv: a folder, into which every rank writes `rank<R>.json`.

The runs use the project as a person would, through the names that the README gives. Model, data
and loss need nothing but sums and products of floats, and the random numbers are integers, because
exponentials and normal numbers are computed differently on different processors. See also
record.ARITHMETIC.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgc import Compression, DistributedOptimizer, row_sparse_names
from dgc.comm import HorovodComm
from optim import Adam, FactoredAdam

NUM_STEPS = 100
STEPS_PER_EPOCH = 15  # dgc_sgd's density warm-up of 5 epochs ends at step 75
NUM_CLASSES, NUM_WORDS, WIDTH = 10, 400, 160
BATCH_SIZE_PER_RANK, WORDS_PER_EXAMPLE = 16, 12

Wrap = Callable[[nn.Module, HorovodComm], DistributedOptimizer]


def recommended(model: nn.Module, comm: HorovodComm) -> DistributedOptimizer:
    """configs/optim/parsimony.py at 1%, with a row-sparse embedding, weight decay and clipping."""
    return DistributedOptimizer(
        FactoredAdam(model.parameters(), lr=0.003, betas=(0.0, 0.999), weight_decay=0.01,
                     decoupled_weight_decay=True),
        model.named_parameters(), comm=comm, row_sparse=row_sparse_names(model),
        compression=Compression(
            density=0.01, residual_dtype="bfloat16", value_dtype="mxfp8",
            index_coding="elias_fano", update_scale=4.0, share_statistics=0.5,
            clip_scope="tensor", clip_norm=0.1, protocol="gather",
        ),
    )  # fmt: skip


def dgc_sgd(model: nn.Module, comm: HorovodComm) -> DistributedOptimizer:
    """configs/optim/sgd.py with configs/dgc/wm5.py: DGC as published; slices summed by owners."""
    return DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
        model.named_parameters(), comm=comm, bucket_bytes=2**16,
        compression=Compression(
            density=0.001, density_warmup_epochs=5, clip_norm=0.1, protocol="sparse_all_reduce",
        ),
    )  # fmt: skip


def dense(model: nn.Module, comm: HorovodComm) -> DistributedOptimizer:
    """configs/optim/lazy_adam.py uncompressed, with a row-sparse embedding and micro-batches."""
    return DistributedOptimizer(
        Adam(model.parameters(), lr=0.003, decoupled_weight_decay=True), model.named_parameters(),
        comm=comm, row_sparse=row_sparse_names(model),
        micro_batches_per_step=RUNS["dense"].micro_batches_per_step,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    wrap: Wrap
    """Make the optimizer of a model."""
    row_sparse_embedding: bool
    micro_batches_per_step: int = 1


RUNS = {
    "recommended": Run(wrap=recommended, row_sparse_embedding=True),
    "dgc_sgd": Run(wrap=dgc_sgd, row_sparse_embedding=False),
    "dense": Run(wrap=dense, row_sparse_embedding=True, micro_batches_per_step=2),
}


class Classifier(nn.Module):
    """Sums embeddings, then two layers.

    Embedding and `hidden` are large enough that what leaves is found by a threshold
    (Compression.exact_below), `scores` is ranked, and the biases are sent whole.
    """

    def __init__(self, row_sparse_embedding: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, 64, sparse=row_sparse_embedding)
        self.hidden = nn.Linear(64, WIDTH)
        self.scores = nn.Linear(WIDTH, NUM_CLASSES)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            integers = torch.randint(-128, 129, parameter.shape, generator=generator)
            parameter.data.copy_(integers / 1024)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.hidden(self.embedding(words).sum(1)).relu())


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return words (B, W) and their classes (B,): a class has 80 of the 400 words."""
    classes = torch.randint(NUM_CLASSES, (BATCH_SIZE_PER_RANK,), generator=generator)
    shape = (BATCH_SIZE_PER_RANK, WORDS_PER_EXAMPLE)
    near = torch.randint(2 * NUM_WORDS // NUM_CLASSES, shape, generator=generator)
    return (classes[:, None] * (NUM_WORDS // NUM_CLASSES) + near) % NUM_WORDS, classes


def squared_error(scores: Tensor, classes: Tensor) -> Tensor:
    wanted = torch.eye(NUM_CLASSES)[classes]
    return (scores - wanted).square().mean()


def train(run: Run, comm: HorovodComm) -> dict[str, Any]:
    """Return this rank's loss in each step, and digests of what it holds after the last."""
    model = Classifier(run.row_sparse_embedding)
    optimizer = run.wrap(model, comm)
    generator = torch.Generator().manual_seed(100 + comm.rank)
    losses = []
    for step in range(NUM_STEPS):
        if step % STEPS_PER_EPOCH == 0:
            optimizer.set_epoch(step // STEPS_PER_EPOCH)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(run.micro_batches_per_step):
            words, classes = batch(generator)
            loss = squared_error(model(words), classes) / run.micro_batches_per_step
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    optimizer.check_replicas()
    result = {
        "losses": [loss.hex() for loss in losses],
        "parameters": digest_of(list(model.parameters())),
        "optimizer_state": digest_of(optimizer.state_dict()),
        "worker_state": digest_of(optimizer.worker_state_dict()),
    }
    optimizer.close()
    return result


def digest_of(value: Any) -> str:
    """Return a digest of the bits of all tensors in a value, whatever their names and order."""
    digests = sorted(hashlib.sha256(_bytes(tensor)).digest() for tensor in tensors_in(value))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value of nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def main(folder: Path) -> None:
    import horovod.torch as hvd

    hvd.init()
    comm = HorovodComm()
    curves = {name: train(run, comm) for name, run in RUNS.items()}
    (folder / f"rank{comm.rank}.json").write_text(json.dumps(curves))
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
