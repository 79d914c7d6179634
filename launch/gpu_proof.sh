#!/usr/bin/env bash
# launch/gpu_proof.sh OUT [--stages 1,2,3,4,5] [--rehearse] | --collect FOLDER
#
# What Parsimony does on an NVIDIA GPU, proved by one command that needs no network: right or wrong, how
# fast, four workers in one process, two ranks that share the GPU, BERT-Large's shapes. At most eight files
# are left in OUT; table.md has it all. It needs Python 3.12 with torch, torchvision, scikit-learn (for its
# digits), CuPy and pytest, and nvcc; to build Horovod (4h) g++, CMake and ninja.
#   --stages N,...     only these (benchmarks/gpu/proof.py says what each does, and its time limit). 4 is
#                      4t, ranks under torchrun, and 4h, where Horovod's source is among the wheels
#   --rehearse         without a GPU: every stage on the emulator or the CPU, with small sizes
#   --collect FOLDER   get the wheels that a bare machine without network lacks, and Horovod's source.
#                      Lay the folder into the tree as .whl, or name it: PARSIMONY_WHEELS=FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

wheels=${PARSIMONY_WHEELS:-$repo/.whl}
python=${PARSIMONY_PYTHON:-python3}

# Those beside torch, CuPy and pytest, with the versions that requirements.txt pins where it does.
packages=(fiddle absl-py libcst graphviz PyYAML typeguard tensorboardX protobuf tqdm cloudpickle packaging
    expecttest torch-SM3 pytest-xdist execnet)

# pinned NAME: as requirements.txt has it, with its version if it is there.
pinned() {
    local found
    found=$(sed -n "s/^\($1==[^ ]*\).*/\1/p" "$repo/requirements.txt")
    echo "${found:-$1}"
}

collect() {
    local name wanted=() platforms=()
    for name in "${packages[@]}"; do wanted+=("$(pinned "$name")"); done
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${name}_x86_64")
    done
    "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$1" "${wanted[@]}"
    "$python" -m pip download --no-deps --no-binary horovod -d "$1" "$(pinned horovod)"
}

case ${1:-} in
'' | -h | --help) usage; exit ;;
--collect) value_of "$@"; collect "$value"; exit ;;
esac
out=$1; shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$repo"
export PYTHONUNBUFFERED=1 PYTHONPATH=$repo
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d "${TMPDIR:-/tmp}/parsimony-site.XXXXXX")
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$wheels"/*.whl
    PYTHONPATH=$site:$repo
fi
PARSIMONY_WHEELS=$wheels "$python" -m benchmarks.gpu.proof "$out" "$@"
