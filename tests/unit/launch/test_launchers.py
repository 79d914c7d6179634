"""The commands that launch/*.sh would start, as a dry run prints them; set-up's first decisions."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
TRAIN = str(REPO / "train.py")


def launch(script: str, *arguments: str, cwd=REPO, dry_run="1", **env: str):
    if script != "setup.sh":
        env = {"PARSIMONY_WITHOUT_HOROVOD": "0"} | env
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "LD_"))}
    return subprocess.run(
        [REPO / "launch" / script, *arguments],
        cwd=cwd,
        env=clean | {"PARSIMONY_DRY_RUN": dry_run} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def command_of(*arguments: str, **options) -> list[str]:
    done = launch(*arguments, **options)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    return shlex.split(line[2:])


def test_train_passes_everything_after_its_own_options_untouched(tmp_path):
    rest = ["--configs", "a b.py", "c.py", "--configs.lrs", "[0.1, 0.2]", "-np", "7", "--gloo"]
    command = command_of("train.sh", "-np", "2", *rest, cwd=tmp_path)
    start = command.index("mpirun")
    assert command[start : start + 5] == ["mpirun", "-np", "2", "-H", "localhost:2"]
    assert command[command.index("python") :] == ["python", TRAIN, *rest]


def test_train_takes_the_number_of_ranks_from_the_hosts():
    command = command_of("train.sh", "-H", "a:4,b", "--gloo", "--configs", "x.py")
    assert command[:6] == ["horovodrun", "-np", "5", "-H", "a:4,b", "--gloo"]
    assert command_of("train.sh", "-H", "a:4,b", "--configs", "x.py")[:5] == (
        ["mpirun", "-np", "5", "-H", "a:4,b"]
    )


def test_more_ranks_than_cores_is_allowed_with_a_note():
    done = launch("train.sh", "-np", "4096", "--configs", "x.py")
    assert "4096 ranks share" in done.stderr
    assert "OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1 mpirun" in done.stderr


@pytest.mark.parametrize("script", ["train.sh", "mpirun.sh"])
def test_no_arguments_shows_the_usage(script):
    done = launch(script)
    assert done.returncode == 2
    assert "--configs FILE..." in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["-np"], ["-np", "two"], ["-H", "a:0"], ["-H", "a:b"], ["--restarts", "-1"], ["--min-np"]],
)
def test_train_refuses_a_wrong_option_by_name(arguments):
    done = launch("train.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"train.sh: {arguments[0]}")


def test_options_of_horovodrun_are_refused_where_mpirun_starts_the_ranks():
    done = launch("train.sh", "-np", "2", "--configs", "x.py", HOROVODRUN_ARGS="--verbose")
    assert done.returncode == 2 and "HOROVODRUN_ARGS=--verbose" in done.stderr
    assert "MPIRUN_ARGS" in done.stderr
    command = command_of(
        *("train.sh", "-np", "2", "--gloo", "--configs", "x.py"), HOROVODRUN_ARGS="--verbose"
    )
    assert "--verbose" in command


def test_mpirun_starts_one_rank_a_slot_and_hands_on_the_environment():
    command = command_of(
        *("mpirun.sh", "-H", "a:8,b:4", "--configs", "x.py"), MPIRUN_ARGS="-v -q", NCCL_DEBUG="INFO"
    )
    assert command[:5] == ["mpirun", "-np", "12", "-H", "a:8,b:4"]
    assert {"PATH", "NCCL_DEBUG"} <= {command[i + 1] for i, x in enumerate(command) if x == "-x"}
    assert command[-6:] == ["-v", "-q", "python", TRAIN, "--configs", "x.py"]


def test_slurm_turns_its_allocation_into_hosts(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\nn7\\n'\n")
    scontrol.chmod(0o755)
    command = command_of(
        *("slurm.sh", "--configs", "x.py"),
        cwd=tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(REPO),
        SLURM_JOB_NODELIST="n[1-2,7]",
        SLURM_TASKS_PER_NODE="8(x2),4",
    )
    assert command[:5] == ["mpirun", "-np", "20", "-H", "n1:8,n2:8,n7:4"]


def test_slurm_without_scontrol_stops_with_a_message(tmp_path):
    for tool in ("bash", "dirname", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    settings = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "8(x2)"}
    done = launch("slurm.sh", PATH=str(tmp_path), SLURM_SUBMIT_DIR=str(REPO), **settings)
    assert done.returncode == 2
    assert "scontrol, which comes with SLURM, does not tell the hosts of n[1-2]" in done.stderr


def test_without_horovod_torchrun_starts_the_ranks(tmp_path):
    without = {"PARSIMONY_WITHOUT_HOROVOD": "1"}
    command = command_of("train.sh", "-np", "2", "--configs", "x.py", **without)
    start = command.index("torchrun")
    alone = ["--standalone", "--local-addr", "127.0.0.1"]
    assert command[start + 1 : -2] == [*alone, "--nproc-per-node", "2", TRAIN]
    assert command_of("train.sh", "-np", "2", "--torch", "--configs", "x.py") == command
    assert "start one on each" in launch("train.sh", "-H", "a:2", **without).stderr
    assert "start a torchrun on each host" in launch("mpirun.sh", "-H", "a:2", **without).stderr
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(REPO),
                "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", **without}  # fmt: skip
    command = command_of("slurm.sh", "--configs", "x.py", SLURM_TASKS_PER_NODE="8(x2)", **settings)
    assert command[0] == "srun" and "n1:29407" in command
    start = command.index("torchrun")
    assert command[start + 1 : start + 5] == ["--nnodes", "2", "--nproc-per-node", "8"]
    uneven = launch("slurm.sh", "--configs", "x.py", SLURM_TASKS_PER_NODE="8,4", **settings)
    assert "as many on each node" in uneven.stderr


@pytest.mark.parametrize("home", ["", "~/"])
def test_setup_leaves_a_folder_that_it_did_not_make_alone(tmp_path, home):
    (tmp_path / "precious").touch()
    venv = f"~/{tmp_path.name}" if home else str(tmp_path)
    done = launch("setup.sh", PARSIMONY_VENV=venv, HOME=str(tmp_path.parent))
    assert done.returncode == 2
    assert f"{tmp_path} was not made by launch/setup.sh" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_setup_makes_a_plain_import_of_torchvision_work_in_every_process(tmp_path):
    """Runs the function of setup.sh on an environment that borrows this one's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    script = (REPO / "launch/setup.sh").read_text()
    functions = [re.search(rf"^{name}\(\) .*?\}}$", script, re.M | re.S)[0]
                 for name in ("site_packages", "settle_torchvision")]  # fmt: skip
    shell = "\n".join([f"repo={REPO} venv={tmp_path}", *functions, "settle_torchvision"])
    subprocess.run(["bash", "-ec", shell], check=True)
    code = (
        "import sys; assert 'torch' not in sys.modules\n"
        "import torchvision; print(torchvision.models.resnet18().fc.out_features)"
    )
    python = [tmp_path / "bin/python", "-c", code]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "1000\n", done.stderr


def test_setup_is_quick_when_complete():
    launch("setup.sh")  # completes it if requirements.txt has just changed
    start = time.monotonic()
    done = launch("setup.sh")
    assert done.returncode == 0
    assert done.stderr == ""
    assert time.monotonic() - start < 1
