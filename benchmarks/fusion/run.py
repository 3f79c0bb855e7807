"""Measure what fused norms, rotary embedding, gates and router cost at a start and save in a step.

    python -m benchmarks.fusion.run --out benchmarks/results

Two processes one after the other: the first finds no compiled code on disk, the second finds the first's.
Each calls every function once, forward and backward, with the widths of M3, and then times it against the
plain operators of torch, in turns, on one thread. Writes a table and JSON; needs g++.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from benchmarks.machine import ROOT, command, machine
from msa_train.config import Rope
from msa_train.model.layers.fused_gate import fused_gate
from msa_train.model.layers.fused_router import best_experts, fused_probs
from msa_train.model.layers.moe.router import _TopkChoice
from msa_train.model.layers.norm import RMSNorm, norm_and_rotate
from msa_train.model.layers.rotary import rotary_table

TOKENS, ROUNDS = 1024, 3
# of M3: width, KV heads, query heads of each, channels, inside an expert, experts, of a token, their sum
HIDDEN, KV_HEADS, GROUP, HEAD, INNER, EXPERTS, TOPK, SCALING = 6144, 4, 16, 128, 3072, 128, 4, 2.0


def main(argv: list[str] | None = None) -> int:
    """Measure in two processes and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(_measure()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHDYNAMO_DISABLE": "0"}
        call = [sys.executable, "-m", "benchmarks.fusion.run", "--child"]
        starts = [
            json.loads(subprocess.run(call, check=True, env=environ, capture_output=True).stdout)
            for _ in range(2)
        ]
    result = {
        "command": command("benchmarks.fusion.run", sys.argv[1:] if argv is None else argv),
        "machine": machine() | {"torch": torch.__version__},
        "tokens": TOKENS,
        "cold": starts[0],
        "warm": starts[1],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fusion.json").write_text(json.dumps(result, indent=1) + "\n")
    text = _markdown(result)
    (arguments.out / "fusion.md").write_text(text)
    print(text)
    return 0


def _measure() -> dict[str, Any]:
    """Return seconds of the first calls together, and of each function later, both ways."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    pairs = _functions()
    start = time.perf_counter()
    for _, fused, x in pairs:
        _both_passes(fused, x)
    first = time.perf_counter() - start
    for name, fused, x in pairs:
        plain = _plain(name)
        best = {"plain_s": float("inf"), "fused_s": float("inf")}
        for _ in range(ROUNDS):
            for key, function in (("plain_s", plain), ("fused_s", fused)):
                start = time.perf_counter()
                _both_passes(function, x)
                best[key] = min(best[key], time.perf_counter() - start)
        rows[name] = best
    return {"first_calls_s": first, "functions": rows}


def _norm(width: int, *, is_fused: bool) -> RMSNorm:
    norm = RMSNorm(
        SimpleNamespace(  # type: ignore[arg-type]
            layernorm_zero_centered_gamma=True,
            params_dtype=torch.bfloat16,
            sequence_parallel=False,
            is_fused=is_fused,
        ),
        width,
    )
    norm.weight.data.zero_()
    return norm


def _table() -> tuple[Tensor, Tensor]:
    return rotary_table(torch.arange(TOKENS), rotary_dim=64, rope=Rope(theta=5e6), dtype=torch.float32)


def _functions() -> list[tuple[str, Callable[[Tensor], Tensor], Tensor]]:
    """List name, fused function and input."""
    head, table, bias = _norm(HEAD, is_fused=True), _table(), torch.zeros(EXPERTS)
    heads = torch.randn(TOKENS, KV_HEADS, GROUP, HEAD).bfloat16()
    return [
        ("norm of a layer", _norm(HIDDEN, is_fused=True), torch.randn(TOKENS, 1, HIDDEN).bfloat16()),
        ("head norm and rotary, queries", lambda x: norm_and_rotate(head, x, table, is_fused=True), heads),
        (
            "head norm and rotary, keys",
            lambda x: norm_and_rotate(head, x, table, is_fused=True),
            heads[:, :, 0].contiguous(),
        ),
        (
            "gate of swiglu_oai, as M3 has it",
            lambda x: fused_gate(x, None, is_oai=True),
            torch.randn(TOKENS, 2 * INNER).bfloat16(),
        ),
        (
            "gate of swiglu, as M2 has it",
            lambda x: fused_gate(x, None, is_oai=False),
            torch.randn(TOKENS, 2 * INNER).bfloat16(),
        ),
        (
            "router, from logits to chosen experts",
            lambda x: fused_probs(x, best_experts(x, bias, TOPK), SCALING),
            torch.randn(TOKENS, EXPERTS),
        ),
    ]


def _plain(name: str) -> Callable[[Tensor], Tensor]:
    """Return the same of plain operators."""
    if name.startswith("norm"):
        return _norm(HIDDEN, is_fused=False)
    if name.startswith("head"):
        head, table = _norm(HEAD, is_fused=False), _table()
        return lambda x: norm_and_rotate(head, x, table, is_fused=False)

    if name.startswith("router"):
        return _plain_router

    def gate(hidden: Tensor) -> Tensor:
        first, up = hidden.chunk(2, dim=-1)
        if "swiglu_oai" in name:
            first, up = first.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return first * torch.sigmoid(1.702 * first) * (up + 1)
        return F.silu(first) * up

    return gate


def _plain_router(logits: Tensor) -> Tensor:
    """Route as Megatron does and as the plain router goes on."""
    choice, bias = _TopkChoice(), torch.zeros(EXPERTS)
    probs, _ = topk_routing_with_score_function(
        logits,
        TOPK,
        scaling_factor=SCALING,
        score_function="sigmoid",
        expert_bias=bias,
        router_replay=choice,  # type: ignore[arg-type]
    )
    return probs.gather(1, choice.take())


def _both_passes(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.detach().requires_grad_()
    out = function(x)
    torch.autograd.grad(out, x, torch.ones_like(out))


def _markdown(result: dict[str, Any]) -> str:
    where = result["machine"]
    lines = [
        "# Fused functions",
        "",
        f"`{result['command']}`, commit {where['commit']}, one thread of {where['cpu']}, torch "
        f"{where['torch']}, bf16, {result['tokens']} tokens, widths of M3. Best of {ROUNDS} rounds in turns, "
        "forward and backward. No GPU has run this.",
        "",
        f"First calls of all of them, compiling included: {result['cold']['first_calls_s']:.1f} s with "
        f"nothing on disk, {result['warm']['first_calls_s']:.1f} s where another process has left its "
        "compiled code. Later numbers of tokens compile nothing.",
        "",
        "| function | plain operators | fused | times as fast |",
        "|---|---|---|---|",
    ]
    for name, row in result["warm"]["functions"].items():
        lines.append(
            f"| {name} | {1e3 * row['plain_s']:.1f} ms | {1e3 * row['fused_s']:.1f} ms | "
            f"{row['plain_s'] / row['fused_s']:.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
