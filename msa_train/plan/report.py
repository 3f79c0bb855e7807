"""Write plans as text and as data for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from msa_train.config import RunConfig
from msa_train.plan.assumptions import GIB, Assumptions
from msa_train.plan.layer_time import PARTS
from msa_train.plan.memory import DEVICE_PARTS, HOST_PARTS
from msa_train.plan.search import Plan
from msa_train.plan.step_time import StepTime
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.rates import KernelRates
from msa_train.simulate.reports.text import table, tokens_text


def plan_text(plan: Plan, assumed: Assumptions, cluster: Cluster, rates: KernelRates) -> str:
    """Write one plan: memory of every stage by part, seconds of a step by part, what is assumed."""
    lines = [headline(plan), "", *memory_table(plan, assumed), ""]
    if plan.time is not None:
        lines += [*time_table(plan.time), ""]
    lines += assumption_lines(plan, assumed, cluster, rates)
    return "\n".join(lines)


def headline(plan: Plan) -> str:
    """Write the layout of a plan in one line."""
    config = plan.config
    parallel = config.parallel
    dp_size = plan.world_size // (parallel.pp_size * parallel.cp_size * parallel.tp_size)
    sizes = {"dp": dp_size, "cp": parallel.cp_size, "tp": parallel.tp_size, "pp": parallel.pp_size}
    groups = " x ".join(f"{name} {size}" for name, size in sizes.items())
    return (
        f"{config.name}: {config.model.name}, {tokens_text(config.data.seq_len)} tokens, "
        f"{plan.world_size} GPUs = {groups}, ep {parallel.ep_size}, head groups of {parallel.cp_head_size}; "
        f"layers {plan.layout}; {config.train.global_batch_size} packs per step; "
        f"recompute {config.train.recompute.value}"
    )


def memory_table(plan: Plan, assumed: Assumptions) -> list[str]:
    """Write GiB by part, a column per stage: the fullest rank of each."""
    stages = range(len(plan.memory))
    rows: list[tuple[str, ...]] = [("GiB of the fullest rank", *(f"stage {stage}" for stage in stages))]
    for part in DEVICE_PARTS:
        values = [memory.device.get(part, 0.0) for memory in plan.memory]
        if any(values):
            rows.append((part, *map(_gib, values)))
    rows.append(("peak", *(_gib(memory.peak) for memory in plan.memory)))
    reserve = assumed.visible_bytes - assumed.usable_bytes
    rows.append(("context, NCCL, fragmentation", *(_gib(reserve) for _ in stages)))
    rows.append(("left of the GPU", *(_gib(assumed.usable_bytes - m.peak) for m in plan.memory)))
    for part in HOST_PARTS:
        values = [memory.host.get(part, 0.0) for memory in plan.memory]
        if any(values):
            rows.append((f"host: {part}", *map(_gib, values)))
    counts = [m.parameters for m in plan.memory]
    rows.append(("parameters, billions", *(f"{(c.dense + c.experts) / 1e9:.2f}" for c in counts)))
    return table(rows)


def trace_lines(traces: dict[int, dict[str, Any]], plan: Plan) -> list[str]:
    """Write what the trainer's own step was found to hold: GiB by part, and the largest source lines.

    Args:
        traces: `TraceReport.to_json` by stage.
        plan: the formulas of the same run, to compare with.
    """
    parts = list(dict.fromkeys(part for trace in traces.values() for part in trace["step"]["by_part"]))
    rows: list[tuple[str, ...]] = [("traced, GiB", *(f"stage {stage}" for stage in traces))]
    for part in parts:
        rows.append((part, *(_gib(trace["step"]["by_part"].get(part, 0)) for trace in traces.values())))
    rows.append(("peak of the step", *(_gib(trace["step"]["num_bytes"]) for trace in traces.values())))
    for name, key in (("peak of the save", "save"), ("host at the save", "save_host")):
        values = [trace[key]["num_bytes"] if trace[key] else 0 for trace in traces.values()]
        rows.append((name, *map(_gib, values)))
    formulas = [
        f"{plan.memory[stage].peak / trace['step']['num_bytes'] - 1:+.1%}" for stage, trace in traces.items()
    ]
    rows.append(("formula against trace", *formulas))
    lines = table(rows)
    for stage, trace in traces.items():
        lines += ["", f"largest in the step of stage {stage}:"]
        for line in trace["step"]["lines"][:8]:
            shape = "x".join(map(str, line["shape"]))
            lines.append(
                f"  {_gib(line['num_bytes']):>6} GiB  {line['count']} x [{shape}] {line['dtype']}, "
                f"{line['part']}: {line['place']}"
            )
    return lines


def time_table(time: StepTime) -> list[str]:
    """Write the seconds of a step by part, of its slowest stage, and what follows from them."""
    rows: list[tuple[str, ...]] = [("part of a step", "s", "share")]
    known = [part for part in PARTS if part in time.parts]
    for part in [*known, *(part for part in time.parts if part not in PARTS)]:
        seconds = time.parts[part]
        rows.append((part, f"{seconds:.2f}", f"{seconds / time.seconds:.1%}"))
    rows.append(("step", f"{time.seconds:.2f}", "100%"))
    stages = ", ".join(f"{seconds:.2f}" for seconds in time.stage_seconds)
    return [
        *table(rows),
        "",
        f"stages {stages} s per pack, slowest / mean {time.imbalance:.2f}; "
        f"{time.tokens_per_s:.0f} tokens/s per GPU; MFU {time.mfu_sparse:.1%} of what is computed, "
        f"{time.mfu_dense:.0%} counted as full attention",
    ]


def assumption_lines(plan: Plan, assumed: Assumptions, cluster: Cluster, rates: KernelRates) -> list[str]:
    """Write what the plan takes for given."""
    documents = "one document" if assumed.num_docs == 1 else f"{assumed.num_docs} equal documents"
    visible = assumed.visible_bytes / GIB
    return [
        f"assumed: f {assumed.f:g}, fullest rank's experts {assumed.imbalance:g} of the mean, {documents} "
        f"per pack; GPUs of {assumed.gpu_memory_gb:g} GB, {visible:.1f} GiB, of these "
        f"{assumed.context_gib:g} for CUDA, {assumed.nccl_gib:g} for NCCL, {assumed.fragmentation:.0%} lost "
        f"to fragmentation; peak {assumed.peak_flops / 1e12:.0f} TFLOP/s",
        f"cluster {cluster.name}; rates {rates.name} ({rates.kind}); memory by formulas: --trace counts the "
        "real step",
    ]


def overrides(plan: Plan, base: RunConfig) -> list[str]:
    """List KEY=VALUE of all that a plan has other than the run it was searched from."""
    result = [f"parallel.pp_layout={plan.layout}"] if plan.config.parallel.pp_size > 1 else []
    for section in ("parallel", "exchange", "optim", "train"):
        old, new = asdict(getattr(base, section)), asdict(getattr(plan.config, section))
        for key, value in new.items():
            if value != old[key] and key != "pp_layout":
                result.append(f"{section}.{key}={_plain(value)}")
    return sorted(result)


def candidates_table(plans: Sequence[Plan], base: RunConfig) -> list[str]:
    """Write the best layouts, a line each."""
    rows: list[tuple[str, ...]] = [("no.", "dp", "cp", "tp", "pp", "ep", "heads", "layers", "peak GiB",
                                    "s per step", "tokens/s/GPU", "MFU", "switches")]  # fmt: skip
    for number, plan in enumerate(plans, 1):
        parallel, time = plan.config.parallel, plan.time
        assert time is not None, "candidates are timed"
        dp_size = plan.world_size // (parallel.pp_size * parallel.cp_size * parallel.tp_size)
        switches = [
            text for text in overrides(plan, base) if not text.startswith(("parallel.", "exchange.ranks"))
        ]
        sizes = (dp_size, parallel.cp_size, parallel.tp_size, parallel.pp_size, parallel.ep_size)
        speed = (f"{time.seconds:.1f}", f"{time.tokens_per_s:.0f}", f"{time.mfu_sparse:.1%}")
        rows.append(
            (
                *(str(size) for size in (number, *sizes, parallel.cp_head_size)),
                str(plan.layout),
                _gib(plan.peak),
                *speed,
                " ".join(switches) or "none",
            )
        )
    return table(rows)


def plan_data(plan: Plan, assumed: Assumptions) -> dict[str, Any]:
    """Return everything of a plan, ready for JSON: bytes, seconds."""
    data: dict[str, Any] = {
        "headline": headline(plan),
        "world_size": plan.world_size,
        "pp_layout": str(plan.layout),
        "parallel": {key: _plain(value) for key, value in asdict(plan.config.parallel).items()},
        "assumed": asdict(assumed),
        "stages": [
            {"device": memory.device, "host": memory.host, "peak": memory.peak,
             "parameters": asdict(memory.parameters)}
            for memory in plan.memory
        ],
    }  # fmt: skip
    if plan.time is not None:
        data["time"] = asdict(plan.time)
    return data


def _plain(value: Any) -> Any:
    """Write a value as it stands on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return getattr(value, "value", value)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"
