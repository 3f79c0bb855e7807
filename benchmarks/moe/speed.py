"""Time grouped experts against megatron-core's SequentialMLP, forward and backward; write a table and JSON.

    python -m benchmarks.moe.speed                     # whole shapes: 6 GiB, some minutes, no GPU
    python -m benchmarks.moe.speed --rows 256 --scale 8 --out /tmp/try

All multiply the same weights and the same rows, sorted by expert, in turns, in one process; the best of the
rounds counts. Counts are uneven: the busiest expert has 16 times the rows of the idlest one. Weights lie
together, as engine=torch lays them; `copied` puts them together for each pass, as under Megatron's optimizer.
Activations are plain everywhere.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from benchmarks.machine import ROOT, command, machine
from msa_train.config import Activation, Fusion, ModelConfig, Precision, RunConfig, TrainConfig
from msa_train.model.layers.moe.experts import GroupedExperts
from msa_train.model.transformer_config import build_transformer_config
from msa_train.parallel.process_groups import build_groups

# name, experts of a rank, width, width inside, activation; M3 on 16 ranks, M2 on 8
SHAPES = (
    ("M3, 8 of 128 experts", 8, 6144, 3072, Activation.swiglu_oai),
    ("M2, 32 of 256 experts", 32, 3072, 1536, Activation.swiglu),
)
RIVALS = ("sequential", "grouped", "copied")
PRECISIONS = (Precision.bf16, Precision.fp32)
# rows of the experts, relative to each other, again and again
SHARES = (16, 12, 10, 8, 8, 6, 3, 1)


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows that arrive at a rank")
    parser.add_argument("--scale", type=int, default=1, help="divide both widths by this, to try it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        build_groups(RunConfig().parallel, device=torch.device("cpu"))
        for precision in PRECISIONS:
            for shape in SHAPES:
                rows.append(_measure(*shape, precision, arguments))
                print(json.dumps(rows[-1]), flush=True)
        dist.destroy_process_group()
    result = {
        "command": command("benchmarks.moe.speed", sys.argv[1:] if argv is None else argv),
        "machine": machine() | {"torch": torch.__version__, "threads": arguments.threads},
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "moe_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    text = _markdown(result)
    (arguments.out / "moe_speed.md").write_text(text)
    print(text)
    return 0


def counts_of(num_experts: int, rows: int) -> list[int]:
    """Deal rows to experts by SHARES.

    Example: 8 experts, 4096 rows -> [1024, 768, 640, 512, 512, 384, 192, 64].
    """
    shares = [SHARES[expert % len(SHARES)] for expert in range(num_experts)]
    counts = [rows * share // sum(shares) for share in shares]
    counts[0] += rows - sum(counts)
    return counts


def _measure(
    name: str,
    num_experts: int,
    width: int,
    inner: int,
    activation: Activation,
    precision: Precision,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Time all in turns; seconds of forward and of backward, and how far their numbers differ."""
    width, inner = width // arguments.scale, inner // arguments.scale
    grouped, sequential = _build(num_experts, width, inner, activation, precision)
    grouped.lay_together()
    counts = counts_of(num_experts, arguments.rows)
    generator = torch.Generator().manual_seed(0)
    dtype = grouped.matrices()[0][0].dtype
    x, grad = (torch.randn(arguments.rows, width, generator=generator).to(dtype) for _ in range(2))
    probs = torch.rand(arguments.rows, generator=generator)
    numbers = torch.tensor(counts)
    offsets = numbers.cumsum(0).to(torch.int32)

    def run_grouped(x: Tensor, probs: Tensor) -> Tensor:
        return grouped.compute(grouped.stacked(), x, probs, offsets, counts)

    def run_copied(x: Tensor, probs: Tensor) -> Tensor:
        weights = [torch.stack(list(matrices)) for matrices in grouped.matrices()]
        return grouped.compute(weights, x, probs, offsets, counts)

    def run_sequential(x: Tensor, probs: Tensor) -> Tensor:
        return sequential(x, numbers, probs)[0]

    best: dict[str, float] = {}
    seen: dict[str, Tensor] = {}
    for _ in range(arguments.rounds):
        for rival, function in zip(RIVALS, (run_sequential, run_grouped, run_copied), strict=True):
            seen[rival] = _both_passes(best, rival, function, (x, probs, grad), grouped)
    difference = (seen["grouped"] - seen["sequential"]).abs().max() / seen["sequential"].abs().max()
    total = {rival: best[f"{rival}_forward_s"] + best[f"{rival}_backward_s"] for rival in seen}
    return {
        "shape": name,
        "experts": num_experts,
        "width": width,
        "inner": inner,
        "counts": counts,
        "precision": precision.value,
        **best,
        "times_as_fast": total["sequential"] / total["grouped"],
        "times_as_fast_copied": total["sequential"] / total["copied"],
        "largest_difference": float(difference),
    }


def _build(
    num_experts: int, width: int, inner: int, activation: Activation, precision: Precision
) -> tuple[GroupedExperts, SequentialMLP]:
    """Build both classes over the same weights."""
    model = ModelConfig(
        hidden_size=width, num_experts=num_experts, moe_ffn_hidden_size=inner, activation=activation
    )
    config = build_transformer_config(
        RunConfig(model=model, train=TrainConfig(precision=precision, fusion=Fusion.none))
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = get_default_pg_collection()
    grouped = GroupedExperts(num_experts, config, linear, groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in grouped.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    # one expert, to have its class; then the weights of the other
    sequential = SequentialMLP(1, config, linear, groups)
    sequential.num_local_experts, sequential.local_experts = num_experts, grouped.local_experts
    return grouped, sequential


def _both_passes(
    best: dict[str, float],
    rival: str,
    function: Callable[[Tensor, Tensor], Tensor],
    given: tuple[Tensor, Tensor, Tensor],
    experts: GroupedExperts,
) -> Tensor:
    """Keep the best seconds of each pass; return the gradient of the rows."""
    inputs = [one.detach().requires_grad_() for one in given[:2]]
    start = time.perf_counter()
    out = function(*inputs)
    middle = time.perf_counter()
    found = torch.autograd.grad(out, [*inputs, *experts.parameters()], given[2])
    end = time.perf_counter()
    for key, seconds in ((f"{rival}_forward_s", middle - start), (f"{rival}_backward_s", end - middle)):
        best[key] = min(best.get(key, float("inf")), seconds)
    return found[0].float()


def _markdown(result: dict[str, Any]) -> str:
    where = result["machine"]
    lines = [
        "# Grouped experts against megatron-core's SequentialMLP",
        "",
        f"`{result['command']}`, commit {where['commit']}, {where['threads']} thread(s) of {where['cpu']}, "
        f"torch {where['torch']}. One layer's experts of a rank, the same weights and rows, forward and "
        f"backward, best of {result['rounds']} rounds in turns. Gradients of the rows differ by at most "
        f"{max(row['largest_difference'] for row in result['rows']):.1e} of the largest one. No GPU has run "
        "this.",
        "",
        "| experts | widths | rows, of one expert | dtype | one by one | grouped | times as fast | copied "
        "| times as fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [
            f"{1e3 * row[f'{rival}_forward_s']:,.0f} + {1e3 * row[f'{rival}_backward_s']:,.0f} ms"
            for rival in RIVALS
        ]
        counts = row["counts"]
        lines.append(
            f"| {row['shape']} | {row['width']} x {row['inner']} | {sum(counts)}, {min(counts)} to "
            f"{max(counts)} | {row['precision']} | {times[0]} | {times[1]} | {row['times_as_fast']:.2f} "
            f"| {times[2]} | {row['times_as_fast_copied']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
