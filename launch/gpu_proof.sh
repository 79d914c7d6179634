#!/usr/bin/env bash
# launch/gpu_proof.sh OUT [--stages 1,2,3,5] [--rehearse] | --collect FOLDER
#
# What Parsimony does on an NVIDIA GPU, proved by one command that needs no network: right or wrong, how
# fast, four workers in one process, BERT-Large's shapes. At most eight files are left in
# OUT; table.md has it all. It needs Python 3.12 with torch, CuPy and pytest, and nvcc.
#   --stages N,...     only these (benchmarks/gpu/proof.py says what each does, and its time limit)
#   --rehearse         without a GPU: every stage on the emulator or the CPU, with small sizes
#   --collect FOLDER   get the wheels that a bare machine without network lacks. Lay the folder into
#                      the tree as .whl, or name it: PARSIMONY_WHEELS=FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

wheels=${PARSIMONY_WHEELS:-$repo/.whl}
python=${PARSIMONY_PYTHON:-python3}

# Those beside torch, CuPy and pytest, with the versions that requirements.txt pins where it does.
packages=(fiddle absl-py libcst graphviz PyYAML typeguard tensorboardX protobuf tqdm cloudpickle packaging
    expecttest torch-SM3 pytest-xdist execnet)

collect() {
    local name pinned wanted=() platforms=()
    for name in "${packages[@]}"; do
        pinned=$(sed -n "s/^\($name==[^ ]*\).*/\1/p" "$repo/requirements.txt")
        wanted+=("${pinned:-$name}")
    done
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${name}_x86_64")
    done
    "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$1" "${wanted[@]}"
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
