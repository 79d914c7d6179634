#!/usr/bin/env bash
# launch/train.sh [-np N] [-H HOSTS] [--mpi | --gloo | --torch] --configs FILE... [settings of train.py]
#
# Train on this machine with Horovod, or torchrun; whatever of the set-up is missing is done first.
# Ctrl-C and SIGTERM reach all ranks: they save and stop, and the same command goes on from there.
#   -np N          number of ranks (default: all that -H names, else 1)
#   -H HOSTS       e.g. server0:4,server1:4; they must reach this folder under the same path, by ssh
#   --mpi, --gloo  who carries Horovod's messages and starts the ranks: mpirun, or horovodrun --gloo
#                  (default: MPI)
#   --torch        start with torchrun, without Horovod (the default where that was left out: see
#                  PARSIMONY_WITHOUT_HOROVOD in launch/setup.sh); for this machine only
#   --restarts N   start again when the job ends badly, from its newest checkpoint, on the hosts that
#                  still answer; give up after N failures without a new checkpoint
#   --min-np M     with that: wait until there are slots for so many ranks (default: 1)
# The rest goes to train.py as it stands; paths in it are relative to the repository.
#   MPIRUN_ARGS          further options for mpirun
#   HOROVODRUN_ARGS      further options for horovodrun, with --gloo; what it sets with MPI are variables,
#                        e.g. HOROVOD_TIMELINE=/tmp/timeline.json for --timeline-filename
#   TORCHRUN_ARGS        further options for torchrun, e.g. "--max-restarts 3"
#   PARSIMONY_DRY_RUN=1  print the command only
# Example: launch/train.sh -np 2 --configs configs/digits/resnet20.py configs/dgc/wm5.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || { usage; exit 2; }
ranks='' hosts='' controller='' by_torch=''
while (($#)); do
    case $1 in
    -np | --num-proc) value_of "$@"; ranks=$value; shift 2 ;;
    -H | --hosts) value_of "$@"; hosts=$value; shift 2 ;;
    --mpi | --gloo) controller=$1; shift ;;
    --torch) by_torch=1; shift ;;
    -h | --help) usage; exit ;;
    *) take_supervision "$@" || break; shift 2 ;;
    esac
done

[[ -z $ranks ]] || is_count "$ranks" || fail "-np $ranks: should be a number of ranks"
count_slots "${hosts:-localhost:${ranks:-1}}"
! without_horovod || [[ -n $controller ]] || by_torch=1
[[ -z ${HOROVODRUN_ARGS:-} || $controller == --gloo ]] ||
    fail "HOROVODRUN_ARGS=$HOROVODRUN_ARGS: goes with --gloo; mpirun starts the ranks otherwise: MPIRUN_ARGS, or HOROVOD_... variables"
[[ -z $by_torch || -z $hosts ]] ||
    fail "-H $hosts: torchrun starts ranks on its own machine; start one on each: see torchrun --help"
enter
local_env=()
[[ -n $hosts ]] || share_cores "$num_ranks"
with=() && ((!${#local_env[@]})) || with=(env "${local_env[@]}")
# shellcheck disable=SC2086  # the ..._ARGS are meant to be split
if [[ -n $by_torch ]]; then
    # The ranks would otherwise look for this host's own name, which need not lead anywhere.
    print_and_supervise "${with[@]}" torchrun --standalone --local-addr 127.0.0.1 \
        --nproc-per-node "$num_ranks" ${TORCHRUN_ARGS:-} "$repo/train.py" "$@"
elif [[ $controller == --gloo ]]; then
    print_and_supervise "${with[@]}" horovodrun -np "${ranks:-$num_ranks}" ${hosts:+-H "$hosts"} --gloo \
        ${HOROVODRUN_ARGS:-} python "$repo/train.py" "$@"
else
    mpirun_on "${ranks:-$num_ranks}" -H "${hosts:-localhost:$num_ranks}"
    print_and_supervise "${with[@]}" "${mpirun[@]}" ${MPIRUN_ARGS:-} python "$repo/train.py" "$@"
fi
