#!/usr/bin/env bash
# Sets itself up, then trains or tests.
#
#   ./run.sh                          train run=demo: one process per GPU, else 2 on the CPU
#   ./run.sh test [PYTEST ARGUMENTS]  all checks and tests
#   ./run.sh run=smoke train.steps=5  anything else goes to msa-train; ./run.sh --help
#   ./run.sh --system [...]           any of these with the packages of the current Python, installing nothing:
#                                     for images that bring torch, and machines without a network
#
# Needs Python 3.11 or 3.12, which PYTHON=/path/to/python names if it is not found. Installs into .venv here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
    echo "run.sh: error: $*" >&2
    exit 2
}

is_suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON: is not Python 3.11 or 3.12; name one of these"
        echo "$PYTHON"
        return
    fi
    for candidate in "$@"; do
        # a name on the path may still be a stub that fails
        if command -v "$candidate" >/dev/null && is_suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed and none was found (python3: $(python3 --version 2>&1 | head -n 1));" \
        "install one, or name it: PYTHON=/path/to/python3.12 ./run.sh"
}

has_gpu() {
    nvidia-smi -L >/dev/null 2>&1
}

stamp_of() {
    cat pyproject.toml constraints/*.txt run.sh | cksum
    "$1" -c 'import sys; print(sys.version, sys.prefix)'
    pwd
}

set_up() {
    local python=$1 constraints=constraints/cpu.txt stamp
    if has_gpu; then constraints=constraints/gpu.txt; fi
    stamp="$constraints $(stamp_of "$python")"
    if [[ -f "$venv/stamp" && "$(<"$venv/stamp")" == "$stamp" ]]; then return; fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python: lacks venv and pip; install them (Debian, Ubuntu: apt install python3-venv)"
    echo "run.sh: setting up $venv with $("$python" --version); this happens once and takes some minutes"
    "$python" -m venv --clear "$venv"
    # first and alone, so that a CPU build wins where one is offered
    if ! has_gpu; then install "$constraints" torch; fi
    install "$constraints" -e '.[dev,eval,hf,kernels,slurm,deepspeed]'
    echo "$stamp" >"$venv/stamp"
    echo "run.sh: ready; 'source $venv/bin/activate' makes msa-train a command of this shell"
}

install() {
    local constraints=$1
    shift
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$constraints" "$@" ||
        fail "pip install $*: failed, see above; repair the network or the disk and start run.sh again"
}

# No pip and no network: a path file makes this folder importable, beside all that the Python has already.
set_up_system() {
    local python=$1 stamp site
    stamp=$(stamp_of "$python")
    if [[ -f "$venv/stamp" && "$(<"$venv/stamp")" == "$stamp" ]]; then return; fi
    "$python" -c 'import torch, megatron.core, hydra' 2>/dev/null ||
        fail "$python: --system needs torch, megatron-core and hydra-core there; run without --system to install"
    "$python" -m venv --clear --without-pip --system-site-packages "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    {
        pwd
        echo "$PWD/kernels"
        # a virtual environment's packages are not those of the Python it was made from
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
    } >"$site/msa_train.pth"
    local name module
    for name in train eval convert simulate plan checkpoint submit status preflight; do
        module=${name/eval/evaluate}
        printf '#!/bin/sh\nexec "%s" -P -m launchers.%s "$@"\n' "$PWD/$venv/bin/python" "$module" >"$venv/bin/msa-$name"
        chmod +x "$venv/bin/msa-$name"
    done
    echo "$stamp" >"$venv/stamp"
}

run_check() {
    local module=$1
    shift
    if $system && ! "$venv/bin/python" -c "import $module" 2>/dev/null; then
        echo "run.sh: $module is not installed here, its check is left out"
        return
    fi
    "$venv/bin/python" "$@"
}

run_tests() {
    run_check ruff -m ruff check .
    run_check ruff -m ruff format --check .
    run_check pyright -m pyright --pythonpath "$venv/bin/python"
    run_check importlinter -c 'import sys; from importlinter.cli import lint_imports_command; \
sys.argv = ["lint-imports"]; lint_imports_command()'
    local parallel=()
    # much of a test's time is one process waiting for others to start
    if "$venv/bin/python" -c 'import xdist' 2>/dev/null; then
        parallel=(-n 2 --dist loadfile --no-loadscope-reorder)
    fi
    if (($#)); then
        "$venv/bin/python" -m pytest "${parallel[@]}" "$@"
        return
    fi
    # Tests on Slurm mostly wait, for nodes that are lost and jobs that come back: they run beside the others.
    local log=$venv/slurm-tests.log result=0 on_slurm
    "$venv/bin/python" -m pytest -p no:cacheprovider tests/slurm >"$log" 2>&1 &
    on_slurm=$!
    trap "kill $on_slurm 2>/dev/null || true" EXIT
    "$venv/bin/python" -m pytest "${parallel[@]}" --ignore=tests/slurm || result=$?
    wait "$on_slurm" || result=$?
    cat "$log"
    ((result == 0)) || echo "run.sh: tests failed"
    return "$result"
}

run_demo() {
    local num_gpus=0
    if has_gpu; then num_gpus=$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())'); fi
    if ((num_gpus == 0)); then
        exec "$venv/bin/msa-train" run=demo
    elif ((num_gpus == 1)); then
        exec "$venv/bin/msa-train" run=demo parallel.cp_size=1 parallel.ep_size=1
    fi
    # the demo shares a sequence between 2 processes, so their number must be even
    exec "$venv/bin/msa-train" run=demo "launcher.num_processes=$((num_gpus / 2 * 2))" \
        "train.global_batch_size=$((num_gpus / 2))"
}

system=false
venv=.venv
if [[ "${1:-}" == --system ]]; then
    shift
    system=true
    venv=.venv-system
    python=$(find_python python3 python python3.12 python3.11)
    set_up_system "$python"
else
    python=$(find_python python3.12 python3.11 python3)
    set_up "$python"
fi

case "${1:-}" in
    "") run_demo ;;
    test) shift && run_tests "$@" ;;
    *) exec "$venv/bin/msa-train" "$@" ;;
esac
