#!/usr/bin/env bash
# Fills a folder with the wheels that an image with torch, Triton and the usual packages lacks, for a machine with a
# GPU but no network: Python 3.12, Linux, x86-64.
#
#   benchmarks/gpu/wheels.sh .wheels                     # what first_run.sh needs
#   benchmarks/gpu/wheels.sh --with-flash-msa .wheels    # and flash-msa with what it needs, in .wheels/flash_msa
#
# Prints the sizes and fails if all wheels together are above --limit-mib (60). Needs pip and a network; PYTHON names
# the Python whose pip is used. Safe to call again: wheels that are there are kept, those of other versions removed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly python=${PYTHON:-python3}
# hydra-core and omegaconf ask for 4.9.*, of which the last is offered as source alone
readonly antlr=antlr4-python3-runtime==4.9.3
readonly from_constraints=(megatron-core hydra-core omegaconf zstandard)
# The DSL and FlashAttention 4 that flash-msa 0.1.1 needs, beside what the image has: cuda-bindings, ninja, einops.
readonly flash_msa=(
    flash-msa==0.1.1 flash-attn-4==4.0.0b36 quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2
    torch-c-dlpack-ext==0.1.5 cuda-python==13.4.4
    nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1
    nvidia-cutlass-dsl-libs-cu13==4.8.1
)
# pip compares the number in a wheel's name, not whether it is low enough
readonly target=(
    --python-version 3.12 --implementation cp --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64
    --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64
)

fail() {
    local code=$1
    shift
    echo "wheels.sh: error: $*" >&2
    exit "$code"
}

# name==version of a package, as constraints/common.txt has it for Python 3.12
pinned() {
    sed -nE "s/^($1==[^; ]+)(; *python_version >= \"3\.12\")? *$/\1/p" "$root/constraints/common.txt"
}

# Wheels of a package are named megatron_core-0.19.2-....whl
fetch() {
    local folder=$1 requirement=$2 name=${2%%==*} version=${2#*==}
    name=${name//-/_}
    if compgen -G "$folder/$name-$version-*.whl" >/dev/null; then return; fi
    rm -f "$folder/$name"-[0-9]*.whl
    if [[ "$requirement" == "$antlr" ]]; then
        "$python" -m pip wheel -q --no-deps --no-binary=:all: -w "$folder" "$requirement"
    else
        "$python" -m pip download -q --no-deps --only-binary=:all: "${target[@]}" -d "$folder" "$requirement"
    fi || fail 1 "$requirement: could not be fetched, see above"
}

# Bytes of all wheels of a folder.
bytes_of() {
    find "$1" -maxdepth 1 -name '*.whl' -printf '%s\n' 2>/dev/null | awk '{sum += $1} END {print sum + 0}'
}

mib() {
    awk -v bytes="$1" 'BEGIN {printf "%.1f MiB", bytes / 1048576}'
}

folder="" with_flash_msa=false limit=60
while (($#)); do
    case "$1" in
        --with-flash-msa) with_flash_msa=true ;;
        --limit-mib)
            [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail 2 "--limit-mib: a number of MiB must follow"
            limit=$2
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) fail 2 "$1: no such option; see --help" ;;
        *)
            [[ -z "$folder" ]] || fail 2 "$1: one folder is enough; it was $folder"
            folder=$1
            ;;
    esac
    shift
done
[[ -n "$folder" ]] || fail 2 "name the folder to fill: benchmarks/gpu/wheels.sh .wheels"
"$python" -m pip --version >/dev/null 2>&1 || fail 2 "$python: has no pip; name another: PYTHON=/path/to/python3"

mkdir -p "$folder"
for name in "${from_constraints[@]}"; do
    requirement=$(pinned "$name")
    [[ -n "$requirement" ]] || fail 1 "$name: constraints/common.txt names no version"
    fetch "$folder" "$requirement"
done
fetch "$folder" "$antlr"
ours=$(bytes_of "$folder") theirs=0
echo "$folder: $(mib "$ours")"
if $with_flash_msa; then
    mkdir -p "$folder/flash_msa"
    for requirement in "${flash_msa[@]}"; do fetch "$folder/flash_msa" "$requirement"; done
else
    # so that what lies there is what the last call was asked for
    rm -f "$folder/flash_msa"/*.whl
fi
theirs=$(bytes_of "$folder/flash_msa")
if $with_flash_msa; then echo "$folder/flash_msa: $(mib "$theirs")"; fi
if ((ours + theirs > limit * 1048576)); then
    fail 1 "$(mib $((ours + theirs))) together, above $limit MiB; --limit-mib N allows more"
fi
