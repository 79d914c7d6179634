"""Train a network from config files, data-parallel, with compressed gradients.

One machine, two ranks:    horovodrun -np 2 python train.py --configs configs/digits/resnet20.py
With torch alone:          torchrun --nproc-per-node 2 train.py --configs ...
With compression:          ... --configs configs/digits/resnet20.py configs/dgc/wm5.py
Change any setting:        ... --configs.train.num_epochs 500 --suffix .e500
Several machines:          mpirun -H server0:8,server1:8 ... python train.py --configs ...
Score the best epoch:      ... --evaluate
Predict its memory:        ... --report memory --memory-gib 16
Set up and start in one:   launch/train.sh -np 2 --configs ...

The run's folder is runs/<configs><suffix>/. The same command again resumes the run from its newest
checkpoint, with as many ranks or with others. Config files are Python: run only what you trust.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from assembly.agreement import check_job
from assembly.parts import build_trainer
from configs import load
from dgc.comm import Comm
from dgc.comm.job import job
from dgc.comm.launched import KINDS, LaunchError
from engine import earlier_folders, report
from engine.checkpoint import CheckpointError
from engine.orphans import end_with_launcher
from engine.replicas import ReplicaError
from engine.run_folder import RunFolderError, held
from engine.stopping import StopSignals
from launch import leftovers


def main() -> None:
    arguments, overrides = parse_arguments(sys.argv[1:])
    end_with_launcher()
    leftovers.sweep()
    signals = StopSignals()
    if not (arguments.report or arguments.evaluate):  # these have nothing to save
        signals.listen()
    if arguments.report:  # the other ranks wait while rank 0 predicts; Horovod must not end the job
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "0")
    try:
        with job(None if arguments.comm == "auto" else arguments.comm) as comm:
            try:
                status = run_job(arguments, overrides, comm, signals)
            except (load.ConfigError, CheckpointError, ReplicaError, RunFolderError) as error:
                raise SystemExit(str(error)) from error  # a mistake of the user: no traceback
    except LaunchError as error:
        raise SystemExit(str(error)) from error
    gc.freeze()  # or Python looks through all modules again at its end, for seconds
    sys.exit(status)  # when all ranks have left the job in good order


def run_job(
    arguments: argparse.Namespace, overrides: dict[str, str], comm: Comm, signals: StopSignals
) -> int:
    """Do what the options ask for; return the exit status."""
    config = load.compose(arguments.configs, overrides)
    flat_config = load.flatten(config)
    check_job(comm, flat_config, vars(arguments))
    run = load.build(config)
    if run.data.num_workers_per_rank:
        leftovers.name_ours()
    device = choose_device(arguments.devices, comm)
    name, runs = load.run_name(arguments.configs), Path(os.path.expanduser(arguments.runs))
    folder, told = earlier_folders.find(runs, name, arguments.suffix, comm)
    reporter = report.Reporter(folder) if comm.rank == 0 else report.SilentReporter()
    reporter.say("\n".join(f"{path} = {value}" for path, value in flat_config.items()))
    reporter.say(f"folder of this run: {folder.resolve()}" + (f" ({told})" if told else ""))
    if arguments.report == "memory":
        from assembly.memory_report import report_memory  # a rank that trains starts without it

        report_memory(run, comm, device, folder, reporter, memory_gib=arguments.memory_gib,
                      num_steps=arguments.report_steps)  # fmt: skip
        return 0
    with nullcontext() if arguments.evaluate else held(folder, comm):  # --evaluate writes nothing
        trainer = build_trainer(run, comm, device, folder, flat_config, reporter)
        if arguments.evaluate:
            metrics = trainer.evaluate_best()
            reporter.say("\n".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
            return 0
        return trainer.train(signals)


def parse_arguments(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the options, and the overrides of settings: dotted path below `configs` -> text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", required=True, metavar="FILE",
                        help="config files, applied left to right")  # fmt: skip
    parser.add_argument("--suffix", default="", help="added to the name of the run's folder")
    parser.add_argument("--evaluate", action="store_true",
                        help="load the best checkpoint and print its metrics")  # fmt: skip
    parser.add_argument("--report", choices=["memory"],
                        help="instead of training: what it takes, and with rivals")  # fmt: skip
    parser.add_argument("--memory-gib", type=float, metavar="GIB",
                        help="of a rank: report the largest batches that fit")  # fmt: skip
    parser.add_argument("--report-steps", type=int, default=3, metavar="N",
                        help="real steps to measure (default: 3); 0: predict only")  # fmt: skip
    parser.add_argument("--devices", choices=["auto", "cpu", "gpu"], default="auto",
                        help="auto: a GPU for each rank, or shared, if there is one")  # fmt: skip
    parser.add_argument("--comm", choices=["auto", *KINDS], default="auto",
                        help="auto: torch under torchrun, else Horovod")  # fmt: skip
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
    arguments = parser.parse_args(others)
    if arguments.report and arguments.evaluate:
        parser.error("--report and --evaluate: give one of them")
    if arguments.memory_gib is not None and not (arguments.report and arguments.memory_gib > 0):
        parser.error("--memory-gib goes with --report memory; allowed: above 0")
    if arguments.report_steps < 0 or arguments.report_steps == 1:
        parser.error("--report-steps: allowed: 0, or 2 or more, as the first step makes state")
    return arguments, overrides


def choose_device(wanted: str, comm: Comm) -> torch.device:
    """Return this rank's device; set it up, and divide the machine's cores among its ranks."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_size))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        torch.set_flush_denormal(True)  # or a saturated LSTM's tiny gradients take 20 times as long
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(
            "--devices gpu: torch sees no GPU; see launch/doctor, or use --devices cpu"
        )
    torch.backends.cudnn.deterministic = True  # so that a resumed run repeats itself
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same, for LSTMs
    device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    main()
