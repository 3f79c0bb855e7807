"""Measure full attention over ranks: error beside one process, memory of keys' gradients, kernel calls.

`python -m benchmarks.full_attention.run --out benchmarks/results`, on a CPU, about a minute of one core.
`before` is what the project did until then, rebuilt here: partial outputs rounded to bf16 at every merge,
gradients of keys added in bf16, one gradient of each key per query head, a call per segment and range.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from msa_kernels.full_attention import torch_cpu
from msa_kernels.full_attention.op import attention_backward, attention_forward, merge_parts, most_keys
from torch import Tensor

from benchmarks.machine import command, machine
from msa_train.config import KvExchange
from msa_train.parallel.attention import cp_full
from msa_train.parallel.attention.full_spans import plan_pieces
from msa_train.parallel.kv_exchange.full_plan import make_full_plan
from msa_train.parallel.sharding.shard_layout import ShardLayout, visible_parts
from tests.distributed import test_full_accuracy as accuracy
from tests.helpers.many_ranks import run_threads

RANKS = (1, 8, 32, 64)
NAME = "full_attention_error"


def before(size: int) -> list[Tensor]:
    """Output, dq, dk, dv of all tokens, computed by `size` ranks as a ring did it, rounded at every rank."""
    q, k, v, dout = accuracy.tensors()
    n, scale = accuracy.S // size, accuracy.D**-0.5
    shards = [slice(rank * n, (rank + 1) * n) for rank in range(size)]
    limits, outs, dq = [0, n], [], torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rank, rows in enumerate(shards):
        out, lse = None, None
        for other in range(rank, -1, -1):
            keys = shards[other]
            part, part_lse = attention_forward(
                q[rows], k[keys], v[keys], limits, limits, causal=other == rank, softmax_scale=scale
            )
            if out is None or lse is None:
                out, lse = part, part_lse
            else:
                merged, lse = merge_parts(out.permute(1, 2, 0, 3), lse, part.permute(1, 2, 0, 3), part_lse)
                out = merged.permute(2, 0, 1, 3)
        assert out is not None
        assert lse is not None
        outs.append(out.contiguous())
        for other in range(rank, -1, -1):
            keys = shards[other]
            grads = attention_backward(
                dout[rows], q[rows], k[keys], v[keys], outs[-1], lse, limits, limits,
                causal=other == rank, softmax_scale=scale,
            )  # fmt: skip
            for whole, grad in ((dq[rows], grads[0]), (dk[keys], grads[1]), (dv[keys], grads[2])):
                whole += grad
    return [torch.cat(outs), dq, dk, dv]


def errors() -> list[dict[str, Any]]:
    """Errors relative to one bf16 process', by ranks and exchange."""
    cp_full.LEAST_KEYS = accuracy.BLOCK
    rows = []
    for size in RANKS[1:]:
        rows.append({"ranks": size, "way": "before (ring)", **accuracy.ratios(before(size))})
        for exchange in accuracy.EXCHANGES:

            def attend(comm: Any, exchange: KvExchange = exchange) -> list[Tensor]:
                return accuracy.attend(comm, exchange)

            found = accuracy.joined(run_threads(size, attend))
            rows.append({"ranks": size, "way": exchange.value, **accuracy.ratios(found)})
    return rows


def bytes_per_key() -> dict[str, float]:
    """Bytes of dk and dv that the kernel returns for each key at M3's heads: before and now, measured."""
    M, G, D, K, Q = 4, 16, 128, 512, 32
    q, dout = torch.randn(Q, M, G, D).bfloat16(), torch.randn(Q, M, G, D).bfloat16()
    k, v = torch.randn(K, M, D).bfloat16(), torch.randn(K, M, D).bfloat16()
    out, lse = attention_forward(q, k, v, [0, Q], [0, K], causal=False, softmax_scale=D**-0.5)
    seen: list[int] = []
    kernel = torch_cpu._BACKWARD

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = kernel(*args, **kwargs)
        seen.append(sum(x.numel() * x.element_size() for x in result[1:]))
        return result

    torch_cpu._BACKWARD = spy
    try:
        attention_backward(dout, q, k, v, out, lse, [0, Q], [0, K], causal=False, softmax_scale=D**-0.5)
    finally:
        torch_cpu._BACKWARD = kernel
    by_head = [x.permute(1, 2, 0, 3) for x in (dout, q, out)]
    wide = [x.transpose(0, 1)[:, None].expand(-1, G, -1, -1) for x in (k, v)]
    old = kernel(
        by_head[0].contiguous(), by_head[1], *wide, by_head[2].contiguous(), lse, 0.0, False, scale=D**-0.5
    )
    return {
        "before": sum(x.numel() * x.element_size() for x in old[1:]) / K,
        "now": max(seen) / K,
        "keys of a piece": most_keys(q),
    }


def kernel_calls() -> list[dict[str, Any]]:
    """Calls of a layer's forward pass for 1,000 documents of 1,000 tokens on 16 ranks, of the worst rank."""
    block, size, slot, docs = 128, 16, 1024, 1000
    edges = [slot * i for i in range(docs)]
    seq_len = -(-slot * docs // (size * block)) * size * block
    found = []
    for exchange in (KvExchange.selected, KvExchange.all_gather):
        counts = {"before": 0, "now": 0}
        for rank in range(0, size, 5):
            layout = ShardLayout(seq_len=seq_len, block_size=block, cp_rank=rank, cp_size=size)
            plan = make_full_plan(layout, [*edges, seq_len], [1000] * docs, exchange=exchange, balanced=True)
            gathered = exchange is KvExchange.all_gather
            sources = [((0, seq_len),)] if gathered else [layout.ranges, plan.needed]
            parts = [
                part
                for source in sources
                for segment in plan.segments
                for places in source
                for part in visible_parts(segment, *places)
            ]
            pieces = [p for s in sources for p in plan_pieces(plan.segments, s, takes_offset=True)]
            calls = [len(piece.calls) for piece in pieces]
            counts["before"] = max(counts["before"], len(parts))
            counts["now"] = max(counts["now"], sum(calls))
        found.append({"exchange": exchange.value, **counts})
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(cell: Any) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def report(result: dict[str, Any]) -> str:
    """Write the page."""
    names = list(result["errors"][0])
    per_key = result["bytes_per_key"]
    return f"""# Full attention over ranks: exactness, memory, calls

Command: `{result["command"]}`, commit {result["machine"]["commit"]}, on {result["machine"]["cpu"]}.

## Error in bf16 beside one process

Of one bf16 process' error against fp64: 1,024 tokens, 1 KV head, 2 query heads of 64 channels, torch's kernel
of the CPU, all ranks threads of one process. `before`: rounded to bf16 at every merge and sum.

{table(names, [list(row.values()) for row in result["errors"]])}

## Gradients of keys

Bytes of dk and dv that one kernel call returns for each key, measured on the CPU (4 KV heads, 16 query heads
each, 128 channels, bf16): {per_key["before"]:.0f} before, {per_key["now"]:.0f} now.

By arithmetic, for 1,032,192 keys: {per_key["before"] * 1032192 / 1e9:.1f} GB before; now one piece at a
time, {per_key["keys of a piece"]} keys, {per_key["now"] * per_key["keys of a piece"] / 1e9:.3f} GB.
Libraries of GPUs that hold both once per query head hold
{per_key["before"] * per_key["keys of a piece"] / 1e9:.2f} GB for a piece (from their sources).

## Kernel calls

Of a layer's forward pass for 1,000 documents of 1,000 tokens on 16 ranks, the most of every fifth rank;
kernels that take all spans in one call.

{table(list(result["calls"][0]), [list(row.values()) for row in result["calls"]])}
"""


def main() -> None:
    """Measure everything and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": command("benchmarks.full_attention.run", []),
        "machine": machine(),
        "errors": errors(),
        "bytes_per_key": bytes_per_key(),
        "calls": kernel_calls(),
    }
    (arguments.out / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{NAME}.md").write_text(report(result))


if __name__ == "__main__":
    main()
