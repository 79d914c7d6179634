"""Train a network from config files, data-parallel, with compressed gradients.

One machine, two ranks:    horovodrun -np 2 python train.py --configs configs/digits/resnet20.py
With compression:          ... --configs configs/digits/resnet20.py configs/dgc/wm5.py
Change any setting:        ... --configs.train.num_epochs 500 --suffix .e500
Several machines:          mpirun -H server0:8,server1:8 ... python train.py --configs ...
Score the best epoch:      ... --evaluate
Set-up and start in one:   launch/train.sh -np 2 --configs ...

The run's folder is runs/<configs>.np<ranks><suffix>/. Started again, a run takes up its newest
checkpoint. Config files are Python: run only those that you trust.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from configs import load
from configs.schema import Run
from dgc import DistributedOptimizer, row_sparse_names
from dgc.comm import HorovodComm, horovod_job
from engine import report
from engine.checkpoint import CheckpointError
from engine.loop import Trainer
from engine.meters import AccuracyMeter
from engine.precision import make_grad_scaler
from engine.sampling import make_eval_loader, make_train_loader
from engine.schedules import LearningRate
from engine.state import RunState, polyak


def main() -> None:
    arguments, overrides = parse_arguments(sys.argv[1:])
    with horovod_job() as comm:
        try:
            run_job(arguments, overrides, comm)
        except (load.ConfigError, CheckpointError) as error:  # the person's to mend: no trace
            raise SystemExit(str(error)) from error


def run_job(arguments: argparse.Namespace, overrides: dict[str, str], comm: HorovodComm) -> None:
    config = load.compose(arguments.configs, overrides)
    flat_config = load.flatten(config)
    check_same_everywhere(comm, flat_config, arguments)
    run = load.build(config)
    device = choose_device(arguments.devices, comm)
    name = load.run_name(arguments.configs, comm.world_size, arguments.suffix)
    folder = Path(arguments.runs) / name
    reporter = report.Reporter(folder) if comm.rank == 0 else report.SilentReporter()
    reporter.say("\n".join(f"{path} = {value}" for path, value in flat_config.items()))
    trainer = build_trainer(run, comm, device, folder, flat_config, reporter)
    if arguments.evaluate:
        metrics = trainer.evaluate_best()
        reporter.say("\n".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    else:
        trainer.train()


def parse_arguments(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the options, and the overrides: dotted path below `configs` -> text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", required=True, metavar="FILE",
                        help="config files, applied left to right")  # fmt: skip
    parser.add_argument("--suffix", default="", help="added to the name of the run's folder")
    parser.add_argument("--evaluate", action="store_true",
                        help="load the best checkpoint and print its metrics")  # fmt: skip
    parser.add_argument("--devices", choices=["auto", "cpu", "gpu"], default="auto",
                        help="auto: a GPU for each rank of a machine, if there is one")  # fmt: skip
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    overrides, others, rest = {}, [], iter(words)
    for word in rest:
        if not word.startswith("--configs."):
            others.append(word)
            continue
        path, equals, value = word.removeprefix("--configs.").partition("=")
        if not equals and (value := next(rest, None)) is None:
            parser.error(f"{word} needs a value")
        overrides[path] = value
    return parser.parse_args(others), overrides


def check_same_everywhere(
    comm: HorovodComm, flat_config: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Stop, on every rank, where ranks were given different settings, options or versions."""
    options = {f"--{option}": value for option, value in vars(arguments).items()}
    versions = {f"version of {name}": value for name, value in report.versions().items()}
    refuse_differences(comm, {**flat_config, **options, **versions})


def refuse_differences(comm: HorovodComm, mine: dict[str, Any]) -> None:
    everyone = comm.all_gather_object(mine)
    for rank, theirs in enumerate(everyone):
        different = load.differences(everyone[0], theirs)
        if different:
            raise SystemExit(f"rank 0 and rank {rank} differ:\n  " + "\n  ".join(different))


def choose_device(wanted: str, comm: HorovodComm) -> torch.device:
    """Return this rank's device, and share the machine's cores among its ranks."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_size))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(
            "--devices gpu: torch sees no GPU; see launch/doctor, or use --devices cpu"
        )
    torch.backends.cudnn.deterministic = True  # a resumed run must repeat what it would have done
    device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def build_trainer(
    run: Run,
    comm: HorovodComm,
    device: torch.device,
    folder: Path,
    flat_config: dict[str, Any],
    reporter: report.Reporter | report.SilentReporter,
) -> Trainer:
    """Build the parts of a run, in the order in which they need each other."""
    torch.manual_seed(run.seed)
    model = build_part("configs.model", run.model).to(device)
    datasets = build_datasets(run, comm)
    loading = {
        "rank": comm.rank,
        "world_size": comm.world_size,
        "num_workers": run.data.num_workers_per_rank,
        "pin_memory": device.type == "cuda",
    }
    train = run.train
    train_loader, sampler = build_part(
        "configs.train",
        make_train_loader,
        datasets["train"],
        batch_size=train.batch_size_per_rank,
        micro_batches_per_step=train.micro_batches_per_step,
        seed=run.seed,
        samples_per_epoch=run.data.samples_per_epoch,
        **loading,
    )
    test_loader = make_eval_loader(
        datasets["test"], batch_size=train.eval_batch_size_per_rank, **loading
    )
    averaged = None
    if train.polyak_decay is not None:  # copied here, before the model's parameters have hooks
        averaged = AveragedModel(model, multi_avg_fn=polyak(train.polyak_decay))
    grad_scaler = make_grad_scaler(train.precision, device)
    groups = parameter_groups(model, train.weight_decay_on_batch_norm)
    optimizer = build_part(
        "configs.train.optimizer",
        DistributedOptimizer,
        build_part("configs.train.optimizer", train.optimizer, groups),
        model.named_parameters(),
        comm=comm,
        compression=run.dgc,
        micro_batches_per_step=train.micro_batches_per_step,
        bucket_bytes=int(train.bucket_mib * 2**20),
        seed=run.seed,
        grad_scaler=grad_scaler,
        row_sparse=row_sparse_names(model),
    )
    steps_per_epoch = len(train_loader) // train.micro_batches_per_step
    workers = comm.world_size * train.micro_batches_per_step
    learning_rate = build_part(
        "configs.train.scheduler",
        LearningRate,
        optimizer,
        scale=workers if train.scale_lr_by_workers else 1,
        warmup_steps=round(train.lr_warmup_epochs * steps_per_epoch),
        make_scheduler=train.scheduler,
        total_steps=train.num_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        per=train.schedule_lr_per,
    )

    train_sums = AccuracyMeter(train.top_k, device)
    state = RunState(model, optimizer, learning_rate, train_sums, device, averaged, grad_scaler)
    return Trainer(
        run,
        state,
        comm=comm,
        loss=build_part("configs.train.loss", train.loss),
        train_loader=train_loader,
        sampler=sampler,
        test_loader=test_loader,
        folder=folder,
        steps_per_epoch=steps_per_epoch,
        flat_config=flat_config,
        config_changes=load.changes,
        reporter=reporter,
    )


def parameter_groups(model: nn.Module, decay_normalization: bool) -> list[dict[str, Any]]:
    """Return the optimizer's groups; normalization layers apart if they are not to decay."""
    if decay_normalization:
        return [{"params": list(model.parameters())}]
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    undecayed = [p for m in model.modules() if isinstance(m, norms) for p in m.parameters(False)]
    ids = {id(p) for p in undecayed}
    decayed = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def build_datasets(run: Run, comm: HorovodComm) -> Any:
    """Build the datasets in three turns, since the first on a disk may have to download."""
    my_turn = 0 if comm.rank == 0 else 1 if comm.local_rank == 0 else 2
    for turn in range(3):
        if turn == my_turn:
            datasets = build_part("configs.dataset", run.dataset)
        comm.barrier("building the dataset on the ranks that go first")
    facts = {f"samples to {split}": len(dataset) for split, dataset in datasets.items()}
    classes = {f"classes to {s}": getattr(d, "classes", None) for s, d in datasets.items()}
    refuse_differences(comm, {**facts, **classes})
    return datasets


def build_part(path: str, make: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Build what a setting names; what it refuses becomes a message with the setting's path."""
    try:
        return make(*arguments, **settings)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise load.ConfigError(f"{path}: {error}") from error


if __name__ == "__main__":
    main()
