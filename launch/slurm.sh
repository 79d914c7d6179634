#!/usr/bin/env bash
#SBATCH --job-name=parsimony
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# sbatch --nodes 4 --ntasks-per-node 8 [--gpus-per-node 8 ...] launch/slurm.sh --configs FILE... [settings]
#
# Train on the hosts that SLURM gives: one rank a task, through launch/mpirun.sh, or where Horovod was left
# out (PARSIMONY_WITHOUT_HOROVOD in launch/setup.sh) with one torchrun a node. Submit it from the
# repository (or set PARSIMONY_HOME to it), on a file system that all nodes share, set up beforehand
# by launch/setup.sh; with PARSIMONY_GPU=1 where the login node has no GPU and the nodes have.
# Limits: mpirun, not srun, starts the ranks, so srun's --cpu-bind and --gpu-bind do not apply: Horovod
# picks a rank's GPU by its local rank. A node's tasks all run; heterogeneous jobs are not supported.
# Two minutes before its time is up SLURM tells the job, which then saves and is queued again, until the run is
# complete; a model that takes longer to save needs an earlier signal: sbatch --signal=B:USR1@600.
#   --restarts N, --min-np M   as in launch/mpirun.sh, before --configs
# MPIRUN_ARGS, TORCHRUN_ARGS and PARSIMONY_DRY_RUN=1 as in launch/mpirun.sh and launch/train.sh.
set -euo pipefail

# sbatch runs a copy of this file, so its own place says nothing.
home=${PARSIMONY_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
home=${home/#\~\//${HOME:-}/}
[[ -x $home/launch/mpirun.sh ]] || {
    echo "slurm.sh: no launch/mpirun.sh in $home. Submit from the repository, or set PARSIMONY_HOME to it" >&2
    exit 2
}
[[ -n ${SLURM_JOB_NODELIST:-} && -n ${SLURM_TASKS_PER_NODE:-} ]] || {
    echo "slurm.sh: not in a SLURM job. Start it with sbatch: see its first lines" >&2
    exit 2
}

# SLURM writes "8(x3),4" for 8 tasks on each of three nodes and 4 on the next.
tasks=()
for group in ${SLURM_TASKS_PER_NODE//,/ }; do
    times=1
    [[ $group != *"(x"* ]] || times=$(tr -dc 0-9 <<<"${group#*(x}")
    for ((i = 0; i < times; i++)); do tasks+=("${group%%(*}"); done
done

if ! names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || [[ -z $names ]]; then
    echo "slurm.sh: scontrol, which comes with SLURM, does not tell the hosts of $SLURM_JOB_NODELIST." \
        "Put it on PATH on the node that runs this script (is SLURM's client installed there?)" >&2
    exit 2
fi
mapfile -t nodes <<<"$names"
((${#nodes[@]} == ${#tasks[@]})) || {
    echo "slurm.sh: $SLURM_JOB_NODELIST has ${#nodes[@]} hosts, SLURM_TASKS_PER_NODE=$SLURM_TASKS_PER_NODE" \
        "is of ${#tasks[@]}. Heterogeneous jobs are not supported" >&2
    exit 2
}

source "$home/launch/common.sh"
while (($#)) && take_supervision "$@"; do shift 2; done
if without_horovod; then
    each=${tasks[0]}
    for count in "${tasks[@]}"; do
        ((count == each)) || fail "SLURM_TASKS_PER_NODE=$SLURM_TASKS_PER_NODE: torchrun needs as many on each node"
    done
    enter
    supervision+=(--requeue)
    # SLURM's srun passes signals on to its tasks, and torchrun does not to its ranks: so each node has
    # a supervisor of its own.
    # shellcheck disable=SC2086  # TORCHRUN_ARGS is meant to be split
    print_and_supervise srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 \
        "$venv/bin/python" -m launch.supervise -- torchrun --nnodes "${#nodes[@]}" --nproc-per-node "$each" --rdzv-backend c10d \
        --rdzv-endpoint "${nodes[0]}:$((29400 + ${SLURM_JOB_ID:-0} % 1000))" --rdzv-id "${SLURM_JOB_ID:-0}" \
        ${TORCHRUN_ARGS:-} "$repo/train.py" "$@"
    exit
fi
hosts=
for i in "${!nodes[@]}"; do hosts+=${hosts:+,}${nodes[i]}:${tasks[i]}; done
exec "$home/launch/mpirun.sh" -H "$hosts" --requeue "${supervision[@]}" "$@"
