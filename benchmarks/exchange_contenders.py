"""The contenders of exchange_speed.py, by name: each trains its own model by equal steps.

A contender is made on every rank in the same way. Horovod runs only while one of its contenders
takes its turn (`Contender.needs_horovod`): its background thread asks the other ranks every
millisecond what is ready, and MPI waits by spinning, which would slow the other contenders where
there are fewer cores than ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compressed_methods import MXFP4, MXFP8
from dgc import Compression, DistributedOptimizer
from dgc.comm import HorovodComm, TorchComm

Options = Any  # the command line of exchange_speed.py
START_POWER_SGD = 2  # DDP lays its buckets out anew after the first step, before PowerSGD can begin


class Contender:
    """Trains without an exchange; the contenders below add theirs."""

    needs_horovod = False

    def __init__(self, options: Options) -> None:
        self.model = make_model(options)
        self.optimizer: Any = torch.optim.SGD(
            self.model.parameters(), lr=options.lr, momentum=options.momentum
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        nn.functional.mse_loss(self.model(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def payload_bytes(self) -> int:
        """What this rank handed to collectives in the last step."""
        return 0

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def make_model(options: Options) -> nn.Module:
    """Return linear layers that begin near the identity, so that they learn within a few steps."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(options.size, options.size, bias=False) for _ in range(options.layers)]
    for layer in layers:
        noise = torch.randn(layer.weight.shape, generator=generator) / options.size**0.5
        layer.weight.data = torch.eye(options.size) + 0.1 * noise
    return nn.Sequential(*layers)


class Ddp(Contender):
    """torch's DistributedDataParallel, over a gloo group of its own, so that if it stalls the other
    contenders go on."""

    def __init__(
        self,
        options: Options,
        *,
        hook: Callable[..., Any] | None = None,
        rank: int = 0,
        bucket_mb: float | None = None,
        group_each: bool = False,
        gloo_threads: int = 2,
        num_bytes: int = 4,
    ) -> None:
        super().__init__(options)
        self._num_bytes, self._rank, self._num_steps = num_bytes, rank, 0
        settings = dist.ProcessGroupGloo._Options()  # what new_group's pg_options would be given
        settings._threads = gloo_threads
        group = dist.new_group(backend="gloo", pg_options=settings)
        self.model = DistributedDataParallel(
            self.model, process_group=group, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True
        )
        if rank and group_each:
            groups = [dist.new_group(backend="gloo") for _ in range(options.layers)]
            states = [PowerSGDState(group, rank, START_POWER_SGD) for group in groups]
            self.model.register_comm_hook(states, power_sgd_in_turn)
        elif rank:
            state = PowerSGDState(group, rank, START_POWER_SGD)
            self.model.register_comm_hook(state, powerSGD_hook)
        elif hook:
            self.model.register_comm_hook(group, hook)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        super().step(inputs, targets)
        self._num_steps += 1

    @property
    def payload_bytes(self) -> int:
        if self._rank and self._num_steps > START_POWER_SGD:
            return 4 * self._rank * sum(sum(p.shape) for p in self.model.parameters())
        return self._num_bytes * self.num_parameters


def bf16_hook(group, bucket):
    """torch's hook under another name; under its own, DDP refuses it without CUDA."""
    return default_hooks.bf16_compress_hook(group, bucket)


def power_sgd_in_turn(states, bucket):  # no annotations: DDP refuses annotations that are strings
    """PowerSGD with a process group for each bucket.

    The hook starts its later collectives from callbacks, and gloo matches the collectives of a
    group by the order in which each rank starts them. With several buckets in one group, threads
    decide that order; when it differs between ranks, a rank waits for ever.
    """
    state = states[bucket.index()]
    if not bucket.is_last():  # the hook counts a step only with the last bucket
        state.iter += 1
    return powerSGD_hook(state, bucket)


class Horovod(Contender):
    needs_horovod = True

    def __init__(self, options: Options, *, compression: str = "none", num_bytes: int = 4) -> None:
        import horovod.torch as hvd

        super().__init__(options)
        self._num_bytes = num_bytes
        self.optimizer = hvd.DistributedOptimizer(
            self.optimizer,
            named_parameters=self.model.named_parameters(),
            compression=getattr(hvd.Compression, compression),
        )

    @property
    def payload_bytes(self) -> int:
        return self._num_bytes * self.num_parameters


class Ours(Contender):
    needs_horovod = True
    kind_of_comm: type[HorovodComm | TorchComm] = HorovodComm

    def __init__(
        self, options: Options, *, bucket_bytes: int | None = None, **compression: Any
    ) -> None:
        super().__init__(options)
        more = {} if bucket_bytes is None else {"bucket_bytes": bucket_bytes}
        self.optimizer = DistributedOptimizer(
            self.optimizer,
            self.model.named_parameters(),
            comm=self.kind_of_comm(),
            compression=Compression(**compression),
            **more,
        )

    @property
    def payload_bytes(self) -> int:
        return self.optimizer.stats.payload_bytes


class OursOnTorch(Ours):
    needs_horovod = False
    kind_of_comm = TorchComm


@contextlib.contextmanager
def horovod_for(contender: type[Contender] | Contender) -> Iterator[None]:
    """Run Horovod in the block if the contender needs it, with the contender's own settings."""
    if not contender.needs_horovod:
        yield
        return
    import horovod.torch as hvd

    is_ours = contender is Ours or isinstance(contender, Ours)
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0" if is_ours else str(128 * 2**20)
    hvd.init()
    yield
    hvd.shutdown()


ONE_BUCKET = {"bucket_mb": 4096.0}
OURS: dict[str, dict[str, Any]] = {
    "ours 0.1%": {"density": 0.001},
    "ours 0.1%, mxfp8": {"density": 0.001, **MXFP8},
    "ours 0.1%, mxfp4, bf16 residual": {
        "density": 0.001, **MXFP4, "residual_dtype": "bfloat16"
    },
    "ours 1%, mxfp8": {"density": 0.01, **MXFP8},
}  # fmt: skip
BUCKET_MIB = (0.25, 1, 4, 16, 64)
SWEEP = {
    f"ours 0.1%, buckets of {size:g} MiB": {
        "density": 0.001,
        **MXFP8,
        "bucket_bytes": int(size * 2**20),
    }
    for size in BUCKET_MIB
}
ALONE, FP16 = "no communication", "DDP fp16"
CONTENDERS: dict[str, tuple[type[Contender], dict[str, Any]]] = {
    ALONE: (Contender, {}),
    "DDP fp32": (Ddp, {}),
    FP16: (Ddp, {"hook": default_hooks.fp16_compress_hook, "num_bytes": 2}),
    "DDP bf16": (Ddp, {"hook": bf16_hook, "num_bytes": 2}),
    "PowerSGD rank 1": (Ddp, {"rank": 1}),
    **{
        f"PowerSGD rank {rank}, {name}": (Ddp, {"rank": rank, **settings})
        for rank in (1, 4)
        for name, settings in {"one bucket": ONE_BUCKET, "group each": {"group_each": True}}.items()
    },
    "Horovod fp32": (Horovod, {}),
    "Horovod fp16": (Horovod, {"compression": "fp16", "num_bytes": 2}),
    **{name: (Ours, settings) for name, settings in OURS.items()},
    **{f"{name}, TorchComm": (OursOnTorch, settings) for name, settings in OURS.items()},
}
EXTRA: dict[str, tuple[type[Contender], dict[str, Any]]] = {  # on request, and in the sweep
    "PowerSGD rank 4": (Ddp, {"rank": 4}),
    "PowerSGD rank 1, 8 threads": (Ddp, {"rank": 1, "gloo_threads": 8}),
    **{name: (Ours, settings) for name, settings in SWEEP.items()},
    "ours dense": (Ours, {"density": 1.0}),
    "ours dense, TorchComm": (OursOnTorch, {"density": 1.0}),
}
