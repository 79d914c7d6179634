#!/usr/bin/env bash
# launch/mpirun.sh -H HOSTS [-np N] --configs FILE... [settings of train.py]
#
# Train on a cluster with Open MPI's mpirun. Every host must reach this folder, set up, under the same
# path (a shared file system), and be reachable by ssh without a password from the first.
#   -H HOSTS           e.g. server0:8,server1:8, the number of ranks after the colon
#   -hostfile FILE     instead of -H: lines of "server0 slots=8"
#   -np N              number of ranks (default: all that the hosts offer)
#   --restarts N       start again when the job ends badly, from its newest checkpoint, on the hosts that
#                      still answer (of a FILE's, where it gives all their slots); give up after N
#                      failures without a new checkpoint
#   --min-np M         with that: wait until there are slots for so many ranks (default: 1)
# The rest goes to train.py as it stands; paths in it are relative to the repository.
#   MPIRUN_ARGS          further options for mpirun, e.g. "-mca btl_tcp_if_include eth0"; set it if the
#                        hosts have several networks, of which not all connect them
#   PARSIMONY_DRY_RUN=1  print the command only
# Variables named HOROVOD_*, NCCL_* and OMP_* reach every rank; others with MPIRUN_ARGS="-x NAME".
# Example: launch/mpirun.sh -H server0:8,server1:8 --configs configs/imagenet/resnet50.py configs/dgc/wm5.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || { usage; exit 2; }
! without_horovod || fail "Horovod and Open MPI were left out here (PARSIMONY_WITHOUT_HOROVOD): start a torchrun on each host"
ranks='' where=()
while (($#)); do
    case $1 in
    -np | -n) value_of "$@"; ranks=$value; shift 2 ;;
    -H | --host) value_of "$@"; where=(-H "$value"); shift 2 ;;
    -hostfile | --hostfile) value_of "$@"; where=(-hostfile "$value"); shift 2 ;;
    --requeue) supervision+=("$1"); shift ;;  # launch/slurm.sh's
    -h | --help) usage; exit ;;
    *) take_supervision "$@" || break; shift 2 ;;
    esac
done
[[ -z $ranks ]] || is_count "$ranks" || fail "-np $ranks: should be a number of ranks"
((${#where[@]})) || fail "name the hosts: -H server0:8,server1:8 or -hostfile FILE"

# The file is the caller's: name it so that it is found from the repository too.
[[ ${where[0]} != -hostfile || ${where[1]} == /* ]] || where[1]=$PWD/${where[1]}
if [[ ${where[0]} == -H && -z $ranks ]]; then count_slots "${where[1]}"; ranks=$num_ranks; fi
enter

mpirun_on "$ranks" "${where[@]}"
# shellcheck disable=SC2086  # MPIRUN_ARGS is meant to be split
print_and_supervise "${mpirun[@]}" ${MPIRUN_ARGS:-} python "$repo/train.py" "$@"
