"""Small models, data and combinations of settings, for the tests of the method as a whole."""

import copy
import itertools
import math

import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import SM3, Adam, FactoredAdam, SketchAdam, SM3Adam

FEATURES, CLASSES, BATCH = 20, 5, 8
NO_FIRST = (0.0, 0.999)


def _make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 100), nn.Tanh(), nn.Linear(100, CLASSES))


INITIAL = _make_model()  # here, since workers are threads that share torch's random state


def _adam(kind, betas=NO_FIRST):
    return lambda params: kind(params, lr=0.01, betas=betas, min_compressed_numel=0)


OPTIMIZERS = {
    "factored": _adam(FactoredAdam),
    "cover": _adam(SM3Adam),
    "sketch": _adam(SketchAdam),
    "full": _adam(Adam),
    "sums": lambda params: SM3(params, lr=0.05),
    "factored, first moment": _adam(FactoredAdam, (0.9, 0.999)),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "torch adam": lambda params: torch.optim.AdamW(params, lr=0.01),
}
# One choice each: what a person may combine. Those that cannot be are told apart by `is_allowed`.
CHOICES = {
    "residual_dtype": ("float32", "bfloat16", "int8"),
    "preconditioning": (None, "late", "early", "after"),
    "select_by": ("raw", "preconditioned"),
    "share_statistics": (0.0, math.inf),
    "momentum": (None, 0.9),
    "velocity_dtype": ("float32", "bfloat16", "int8"),
    "mask_velocity": (True, False),
    "value_dtype": ("float32", "float16", "mxfp8", "mxfp4"),
    "index_coding": ("int32", "elias_fano"),
    "protocol": ("auto", "sparse_all_reduce"),
    "two_level": (False, True),
    "exact_below": (8192, 0),
    "clip": (None, "global", "tensor"),
    "micro_batches": (1, 3),
    "density": (0.02, 1.0),
    "dtype": (torch.float32, torch.float64),
}
_TORCH = ("sgd", "momentum", "torch adam")
_HAS_MOMENTUM = ("factored, first moment", "momentum", "torch adam")


def is_allowed(name, choice):
    where = choice["preconditioning"] or ("after" if name in _TORCH else "late")
    needs_statistics = choice["select_by"] == "preconditioned" or choice["share_statistics"]
    return not (
        (name in _TORCH and where != "after")
        or (where == "after" and needs_statistics)
        or (choice["momentum"] and name in _HAS_MOMENTUM)
    )


def combinations(num_random=60):
    """Every optimizer with every value of each choice, the others drawn at random; fixed."""
    generator = torch.Generator().manual_seed(1)

    def draw(name, fixed):
        while True:
            choice = {
                key: values[int(torch.randint(len(values), (), generator=generator))]
                for key, values in CHOICES.items()
            } | fixed
            if is_allowed(name, choice):
                return choice

    for name in OPTIMIZERS:
        for key, values in CHOICES.items():
            for value in values:
                defaults = {k: v[0] for k, v in CHOICES.items()} | {key: value}
                if is_allowed(name, defaults):
                    yield name, draw(name, {key: value})
    for name in itertools.islice(itertools.cycle(OPTIMIZERS), num_random):
        yield name, draw(name, {})


def compression_of(choice):
    settings = {k: v for k, v in choice.items() if k not in ("clip", "micro_batches", "dtype")}
    if choice["clip"]:
        settings |= {"clip_norm": 0.5, "clip_scope": choice["clip"]}
    return Compression(**settings, min_numel=100, ranks_per_island=2, merged_factor=1)


class Recording:
    """A comm that notes the names of what it gathers and sums."""

    def __init__(self, comm):
        self._comm, self.names = comm, []

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def all_gather_async(self, tensor, name):
        self.names.append(name)
        return self._comm.all_gather_async(tensor, name)

    def all_reduce_async(self, tensor, name):
        self.names.append(name)
        return self._comm.all_reduce_async(tensor, name)


class Job:
    """One worker's model, optimizer and data; `spoil` puts a bad number into a gradient."""

    def __init__(self, comm, name, choice, **settings):
        self.comm, self.model = comm, copy.deepcopy(INITIAL).to(choice["dtype"])
        self.micro_batches = choice["micro_batches"]
        self.optimizer = DistributedOptimizer(
            OPTIMIZERS[name](self.model.parameters()), self.model.named_parameters(), comm=comm,
            compression=compression_of(choice), micro_batches_per_step=self.micro_batches,
            **{"bucket_bytes": 2000, **settings},
        )  # fmt: skip
        self.generator = torch.Generator("cpu").manual_seed(comm.rank)
        self.scaler = settings.get("grad_scaler")

    def step(self, spoil=None):
        """Spoil: (parameter's number, value) for the last micro-batch's gradient, or None."""
        for part in range(self.micro_batches):
            inputs = self.inputs()
            loss = nn.functional.cross_entropy(self.model(inputs), inputs[:, :CLASSES].argmax(1))
            loss = loss / self.micro_batches
            if spoil and part == self.micro_batches - 1:
                weight = list(self.model.parameters())[spoil[0]]
                loss = loss + (weight.view(-1)[3] * spoil[1])
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def inputs(self):
        like = {"dtype": torch.float32, "device": "cpu"}
        inputs = torch.randn(BATCH, FEATURES, generator=self.generator, **like)
        return inputs.to(self.model[0].weight.dtype)

    def state(self):
        """All that a step may touch, copied."""
        return copy.deepcopy(
            {
                "parameters": dict(self.model.named_parameters()),
                "optimizer": self.optimizer.state_dict()["state"],
                "worker": self.optimizer.worker_state_dict(),
            }
        )


def run_jobs(world_size, name, choice, work, wrap=lambda comm: comm, **settings):
    return run_local(world_size, lambda comm: work(Job(wrap(comm), name, choice, **settings)))


def assert_equal(one, other):
    """Compare nested dictionaries and lists of tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other
