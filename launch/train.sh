#!/usr/bin/env bash
# launch/train.sh [-np N] [-H HOSTS] [--mpi | --gloo | --torch] --configs FILE... [settings of train.py]
#
# Train on this machine with Horovod, or torchrun; whatever of the set-up is missing is done first.
#   -np N          number of ranks (default: all that -H names, else 1)
#   -H HOSTS       e.g. server0:4,server1:4; they must reach this folder under the same path, by ssh
#   --mpi, --gloo  who carries Horovod's messages (default: MPI)
#   --torch        start with torchrun, without Horovod (the default where that was left out: see
#                  PARSIMONY_WITHOUT_HOROVOD in launch/setup.sh); for this machine only
# The rest goes to train.py as it stands; paths in it are relative to the repository.
#   HOROVODRUN_ARGS      further options for horovodrun, e.g. "--timeline-filename /tmp/timeline.json"
#   TORCHRUN_ARGS        further options for torchrun, e.g. "--max-restarts 3"
#   PARSIMONY_DRY_RUN=1  print the command only
# Example: launch/train.sh -np 2 --configs configs/digits/resnet20.py configs/dgc/wm5.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || { usage; exit 2; }
ranks='' hosts='' controller=() start=(horovodrun) by_torch=''
while (($#)); do
    case $1 in
    -np | --num-proc) value_of "$@"; ranks=$value; shift 2 ;;
    -H | --hosts) value_of "$@"; hosts=$value; shift 2 ;;
    --mpi | --gloo) controller=("$1"); shift ;;
    --torch) by_torch=1; shift ;;
    -h | --help) usage; exit ;;
    *) break ;;
    esac
done

[[ -z $ranks ]] || is_count "$ranks" || fail "-np $ranks: should be a number of ranks"
count_slots "${hosts:-localhost:${ranks:-1}}"
! without_horovod || [[ -n ${controller[*]} ]] || by_torch=1
[[ -z $by_torch || -z $hosts ]] ||
    fail "-H $hosts: torchrun starts ranks on its own machine; start one on each: see torchrun --help"
enter
if [[ -z $hosts ]]; then
    share_cores "$num_ranks"
    start=(env "${local_env[@]}" horovodrun)
fi
if [[ -n $by_torch ]]; then
    # shellcheck disable=SC2086  # TORCHRUN_ARGS is meant to be split
    print_and_exec env "${local_env[@]}" torchrun --standalone --nproc-per-node "$num_ranks" \
        ${TORCHRUN_ARGS:-} "$repo/train.py" "$@"
    exit
fi
# shellcheck disable=SC2086  # HOROVODRUN_ARGS is meant to be split
print_and_exec "${start[@]}" -np "${ranks:-$num_ranks}" ${hosts:+-H "$hosts"} \
    "${controller[@]}" ${HOROVODRUN_ARGS:-} python "$repo/train.py" "$@"
