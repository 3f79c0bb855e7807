#!/usr/bin/env bash
# All that ten minutes on a machine with one GPU are for, in one command, which a second call continues.
#
#   benchmarks/gpu/first_run.sh --out DIR --wheels .wheels        # wheels: filled by wheels.sh before
#   benchmarks/gpu/first_run.sh --out DIR --smoke                 # tiny, without a GPU too: does all of it run?
#
#   --out DIR       results: NAME.log of each part, parts.tsv, gpu.md, gpu.json, table/, profile/ (default: runs/first_run)
#   --pack FILE     all of DIR in one file, made anew every 20 s (default: DIR/first_run.tar.gz); where DIR has nothing
#                   yet and FILE is there, it is unpacked and gone on from
#   --wheels FOLDER install these for this call, into a temporary folder
#   --parts NAME... only these of: checks trainer tests table profile
#   --budget-s S    seconds for all of it (default: 570)
#   --smoke         tiny sizes; without a GPU on the CPU
#
# No part stops the others. One that ended well is not repeated by a later call with the same code. SIGTERM and Ctrl-C
# end the part that runs and keep everything. Exit code: 0 every part passed or cannot run here; 1 one failed; 2 bad
# arguments; 3 something is left for another call; 143 stopped.
# PYTHON names the Python that has torch (python3); MSA_TRAIN_COMMIT the commit, where there is no .git.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# What comes first is worth most and makes the rest worth reading: right kernels, then the real trainer, which never
# ran on a GPU; its tests are short. The table takes what is left, so it comes after these, and its own measurements
# are ordered by value. Counters explain the table and break most easily, so they come last, in time kept for them.
readonly all_parts=(checks trainer tests table profile)
declare -rA limits=([checks]=90 [trainer]=120 [tests]=60 [table]=330 [profile]=75)
# seconds that a part must have to be begun
readonly worth_beginning=15
# exit codes of parts: nothing to run it on here, measurements are missing
readonly not_here=77 unfinished=3

fail() {
    echo "first_run.sh: error: $*" >&2
    exit 2
}

# A hash of everything that a result depends on, and of what is run: no git is needed.
code_version() {
    {
        find benchmarks conf constraints kernels launchers msa_train run.sh tests/gpu tests/helpers -type f \
            ! -path '*/__pycache__/*' ! -path 'benchmarks/results/*' ! -name '*.md' -print0 2>/dev/null |
            sort -z | xargs -0 sha256sum
        echo "$gpu $smoke"
    } | sha256sum | cut -c 1-16
}

# The last row of a part in parts.tsv, for this code: part, result, exit code, seconds, limit, code.
last_result() {
    awk -F '\t' -v part="$1" -v code="$code_now" '$1 == part && $6 == code {found = $2} END {print found}' \
        "$out/parts.tsv"
}

left() {
    echo $((budget - SECONDS))
}

name_result() {
    case "$1" in
        0) echo passed ;;
        "$not_here") echo "not here" ;;
        "$unfinished") echo unfinished ;;
        124 | 137) echo "timed out" ;;
        *) echo failed ;;
    esac
}

# A part that must leave time for what comes after it, or for itself if that is all there is.
limit_of() {
    local most=${limits[$1]} have
    have=$(($(left) - 5))
    if [[ "$1" == table && " ${parts[*]} " == *" profile "* && "$(last_result profile)" != passed ]] &&
        [[ "$device" == cuda ]]; then
        have=$((have - limits[profile]))
    fi
    echo $((have < most ? have : most))
}

# What a part has started and left behind, a trainer that is saving for example: all of it is in one group.
end_rest() {
    kill -TERM -- "-$child" 2>/dev/null || return 0
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        sleep 0.1
        kill -0 -- "-$child" 2>/dev/null || return 0
    done
    kill -KILL -- "-$child" 2>/dev/null || true
}

run_part() {
    local name=$1 log=$out/$1.log code=0 result start=$SECONDS remark=""
    if [[ "$(last_result "$name")" == passed ]]; then
        printf '%-8s passed before, with the same code: skipped\n' "$name"
        return
    fi
    limit=$(limit_of "$name")
    if ((limit < worth_beginning)); then
        printf '%-8s not begun: %d s are left of %d\n' "$name" "$(left)" "$budget"
        not_begun+=("$name")
        return
    fi
    export limit
    rm -f "$work/remark"
    echo "--- $(date -u '+%F %T') $name, code $code_now, at most $limit s" >>"$log"
    timeout -s TERM -k 10 "$limit" bash benchmarks/gpu/first_run_parts.sh "$name" >>"$log" 2>&1 </dev/null &
    child=$!
    # a signal ends a wait before the part has ended
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    end_rest
    child=""
    result=$(name_result "$code")
    if $stopped; then result=stopped; fi
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$result" "$code" $((SECONDS - start)) "$limit" "$code_now" \
        >>"$out/parts.tsv"
    if [[ -f "$work/remark" ]]; then remark=": $(<"$work/remark")"; fi
    printf '%-8s %s, %d s%s\n' "$name" "$result" $((SECONDS - start)) "$remark"
    case "$result" in passed | "not here") ;; *) tail -n 15 "$log" | sed 's/^/    | /' ;; esac
    pack
}

# All results in one file, never half of it.
pack() {
    local new=$packed.$BASHPID
    # a file that grows meanwhile is no harm
    tar -C "$out" -czf "$new" --exclude './*.tar.gz*' . 2>/dev/null || true
    mv -f "$new" "$packed"
}

keep_packing() {
    trap 'kill "$!" 2>/dev/null; exit' TERM
    while true; do
        sleep 20 &
        wait $!
        pack
    done
}

# shellcheck disable=SC2317  # called by trap
stop() {
    stopped=true
    if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# shellcheck disable=SC2317  # called by trap
clean_up() {
    if [[ -n "$packer" ]]; then
        kill "$packer" 2>/dev/null || true
        wait "$packer" || true
    fi
    rm -rf "$work"
}

install_wheels() {
    compgen -G "$wheels/*.whl" >/dev/null ||
        fail "--wheels=$wheels: has no wheels; fill it with benchmarks/gpu/wheels.sh"
    local files=("$wheels"/*.whl) folder=$work/packages
    if compgen -G "$wheels/flash_msa/*.whl" >/dev/null; then files+=("$wheels"/flash_msa/*.whl); fi
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$folder" "${files[@]}" || fail "--wheels=$wheels: pip cannot install them, see above"
    # one of flash-msa's names this by a path file, which Python reads in its own folder of packages alone
    PYTHONPATH=$folder:$folder/nvidia_cutlass_dsl/dsl_packages:$PYTHONPATH
}

out=runs/first_run packed="" wheels="" smoke=false budget=570 parts=()
while (($#)); do
    case "$1" in
        --out | --pack | --wheels | --budget-s)
            [[ -n "${2:-}" ]] || fail "$1: a value must follow"
            case "$1" in --out) out=$2 ;; --pack) packed=$2 ;; --wheels) wheels=$2 ;; --budget-s) budget=$2 ;; esac
            shift
            ;;
        --parts)
            while [[ -n "${2:-}" && "$2" != --* ]]; do
                [[ " ${all_parts[*]} " == *" $2 "* ]] || fail "--parts=$2: must be among ${all_parts[*]}"
                parts+=("$2")
                shift
            done
            ((${#parts[@]})) || fail "--parts: names must follow, among ${all_parts[*]}"
            ;;
        --smoke) smoke=true ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "$1: no such option; see --help" ;;
    esac
    shift
done
[[ "$budget" =~ ^[1-9][0-9]*$ ]] || fail "--budget-s=$budget: must be a whole number of seconds"
((${#parts[@]})) || parts=("${all_parts[@]}")

out=$(realpath -m "$out") packed=$(realpath -m "${packed:-$out/first_run.tar.gz}")
if [[ -n "$wheels" ]]; then wheels=$(realpath -m "$wheels"); fi
cd "$root"
export PYTHON=${PYTHON:-python3} PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
work=$(mktemp -d) child="" packer="" stopped=false not_begun=()
trap clean_up EXIT
trap stop TERM INT
if [[ -n "$wheels" ]]; then install_wheels; fi
IFS=$'\t' read -r device gpu facts < <("$PYTHON" -c '
import platform
import torch
from benchmarks.machine import commit
device = "cuda" if torch.cuda.is_available() else "cpu"
gpu = torch.cuda.get_device_name(0) if device == "cuda" else "no GPU"
facts = f"{gpu}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit()}"
print(device, gpu, facts, sep="\t")
') || fail "PYTHON=$PYTHON: cannot import torch, see above"
$smoke || [[ "$device" == cuda ]] || fail "no GPU can be used here; --smoke does without"
mkdir -p "$out" "$(dirname "$packed")"
if [[ ! -f "$out/parts.tsv" && -f "$packed" ]]; then tar -C "$out" -xzf "$packed"; fi
touch "$out/parts.tsv"
code_now=$(code_version)
export out work device smoke code_now

echo "$facts"
keep_packing >/dev/null 2>&1 &
packer=$!
for name in "${parts[@]}"; do
    if $stopped; then break; fi
    run_part "$name"
done

code=0
echo "--- after $SECONDS s"
for name in "${parts[@]}"; do
    result=$(last_result "$name")
    printf '%-8s %s\n' "$name" "${result:-not begun}"
    case "$result" in
        passed | "not here") ;;
        failed | "timed out") code=1 ;;
        *) if ((code == 0)); then code=3; fi ;;
    esac
done
pack
echo "all of it: $packed ($(($(stat -c %s "$packed") / 1024)) KiB)"
if $stopped; then exit 143; fi
exit "$code"
