#!/usr/bin/env bash
# The parts of first_run.sh, which calls `first_run_parts.sh NAME` in the project's folder and sets out, work, device,
# smoke, limit (seconds until it ends the part), code_now, PYTHON and PYTHONPATH. Exit code 0: passed; 77: there is
# nothing to run it on here; 3: measurements are missing, which a call again makes; anything else: failed.
set -euo pipefail

# set there too
: "${out:?}" "${work:?}" "${device:?}" "${smoke:?}" "${limit:?}" "${code_now:?}" "${PYTHON:?}"
root=$PWD
readonly not_here=77

# What is said of the part in its line.
remark() {
    echo "$*" | tee "$work/remark"
}

run_all() {
    local arguments=("$PYTHON" benchmarks/gpu/run_all.py --out "$out/table" --device "$device" "$@") code=0
    # the path in torch, which runs everywhere
    if $smoke; then arguments+=(--smoke --kernel cpu); fi
    # it does not mix results of other code, seeds or GPUs; what it refuses to go on with is kept aside
    if [[ -d "$out/table" && "$(cat "$out/table/code" 2>/dev/null)" != "$code_now" ]]; then
        mv "$out/table" "$out/table-$(date +%s)"
    fi
    mkdir -p "$out/table"
    echo "$code_now" >"$out/table/code"
    "${arguments[@]}" || code=$?
    cp -f "$out"/table/gpu.{json,md} "$out" 2>/dev/null || true
    return "$code"
}

part_checks() {
    local parts=(checks)
    # processors have little to do meanwhile
    if ! $smoke; then parts+=(compile); fi
    run_all --parts "${parts[@]}" --budget-s "$((limit - 5))"
}

part_table() {
    # it ends by itself a little before it would be ended
    run_all --budget-s "$((limit > 60 ? limit - 30 : limit / 2))"
}

# Stock Megatron with the shipped configurations: the smoke run, and a run that ends at half of its steps and goes on
# from the checkpoint. They need no more than a corner of a GPU, and run beside each other: starting takes longest.
part_trainer() {
    local runs=$work/runs half=20 smoke_steps=20 shipped code=0
    local common=(parallel.cp_size=1 parallel.ep_size=1 launcher.num_processes=1 logging.tensorboard=false)
    local demo=(
        # muon is for engine=torch alone; a constant rate does not depend on how many steps are to come
        optim.algorithm=adamw optim.lr=4.0e-3 optim.schedule=constant train.precision=bf16
    )
    if [[ "$device" == cuda ]]; then demo+=(engine=megatron); fi
    if $smoke; then
        half=4 smoke_steps=4
        common+=(data.seq_len=512 "data.corpus=$root/msa_train/**/*.py" "train.steps=$smoke_steps")
    fi
    demo+=("checkpoint.every=$half" "train.validate_every=$half" "run_dir=$runs/demo" "data.cache_dir=$runs/cache")
    mkdir -p "$runs" "$out/trainer"
    # makes the environment of --system, once for both
    ./run.sh --system --version
    ./run.sh --system run=smoke "${common[@]}" "run_dir=$runs/smoke" "data.cache_dir=$runs/smoke_cache" \
        >"$runs/smoke.log" 2>&1 &
    shipped=$!
    train_in_two || code=$?
    wait "$shipped" || code=$?
    echo "--- run=smoke"
    cat "$runs/smoke.log"
    cp "$runs"/demo/{metrics.jsonl,summary.json} "$out/trainer" || code=1
    if ((code)); then return "$code"; fi
    "$PYTHON" benchmarks/gpu/visit.py training "$runs/smoke" --steps "$smoke_steps" || code=$?
    "$PYTHON" benchmarks/gpu/visit.py training "$runs/demo" --steps $((2 * half)) >"$runs/line" || code=$?
    remark "$(<"$runs/line")"
    return "$code"
}

train_in_two() {
    ./run.sh --system run=demo "${common[@]}" "${demo[@]}" "train.steps=$half" || return
    ./run.sh --system run=demo "${common[@]}" "${demo[@]}" "train.steps=$((2 * half))" 2>&1 |
        tee "$runs/resumed.log" || return
    if ! grep -q "going on from step $half" "$runs/resumed.log"; then
        echo "the second start did not go on from step $half"
        return 1
    fi
    .venv-system/bin/msa-checkpoint verify "$runs/demo"
}

part_tests() {
    if [[ ! -d tests/gpu ]]; then
        remark "there is no folder tests/gpu"
        return "$not_here"
    fi
    local parallel=() code=0
    # most of their time is Triton's compiler, on the processor
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n "$(($(nproc) < 4 ? $(nproc) : 4))"); fi
    "$PYTHON" -m pytest -m gpu tests/gpu -p no:cacheprovider -q "${parallel[@]}" | tee "$work/pytest" || code=$?
    remark "$(tail -n 1 "$work/pytest")"
    return "$code"
}

# Counters of one launch of each kernel. Clocks are left as they are: --clock-control none.
part_profile() {
    local PATH=$PATH:/usr/local/cuda/bin
    if [[ "$device" != cuda ]] || ! command -v ncu >/dev/null; then
        remark "ncu or a GPU is missing"
        return "$not_here"
    fi
    local wanted=(
        gpu__time_duration.sum dram__bytes_read.sum dram__bytes_write.sum
        lts__t_sector_hit_rate.pct lts__t_bytes.sum gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed
        sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
        sm__inst_executed_pipe_tensor_op_gmma.sum sm__inst_executed_pipe_tensor_op_hmma.sum
        sm__warps_active.avg.pct_of_peak_sustained_active
        launch__registers_per_thread launch__shared_mem_per_block_dynamic launch__grid_size
        launch__occupancy_limit_registers launch__occupancy_limit_shared_mem
    )
    local -A kernels=([scoring]=select_blocks_kernel [forward]=attend_kernel [backward]=attend_backward_kernel)
    local there metrics="" metric operator csv sizes=()
    # a name that this GPU does not have would end the profile
    there=$(timeout -k 2 10 ncu --query-metrics 2>/dev/null | awk '{print $1}' || true)
    for metric in "${wanted[@]}"; do
        if [[ -z "$there" || "$metric" == launch__* ]] || grep -qx "${metric%%.*}" <<<"$there"; then
            metrics+=${metrics:+,}$metric
        fi
    done
    if $smoke; then sizes=(--smoke); fi
    mkdir -p "$out/profile"
    # counters of another code are worth nothing
    if [[ "$(cat "$out/profile/code" 2>/dev/null)" != "$code_now" ]]; then rm -f "$out"/profile/*; fi
    echo "$code_now" >"$out/profile/code"
    for operator in scoring forward backward; do
        csv=$out/profile/$operator.csv
        # a call again makes what is missing
        if grep -q gpu__time_duration "$csv" 2>/dev/null; then continue; fi
        timeout -s TERM -k 5 "$(((limit - 10) / 3))" ncu --clock-control none --target-processes all \
            --profile-from-start off -k "regex:^${kernels[$operator]}" -c 1 \
            --metrics "$metrics" --csv --page raw --log-file "$csv" \
            "$PYTHON" benchmarks/gpu/launch_once.py "$operator" "${sizes[@]}" ||
            echo "$operator: ncu ended with exit code $?"
    done
    "$PYTHON" benchmarks/gpu/visit.py counters "$out"/profile/{scoring,forward,backward}.csv
}

"part_$1"
