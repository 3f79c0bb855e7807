"""Trace the peak memory of one MoE layer of M3, forward and backward, on fake tensors: no memory is needed.

python -m benchmarks.moe.memory                # 16K and 64K tokens a rank, experts over 64 ranks; a minute
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import ROOT, command, machine
from msa_train.config import ModelConfig, ParallelConfig, Precision, RunConfig, TrainConfig
from msa_train.model import gpt
from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.moe import ExpertLayer, experts
from msa_train.model.transformer_config import build_transformer_config
from msa_train.plan.trace.answers import answered
from msa_train.plan.trace.assumptions import Assumptions
from msa_train.plan.trace.cuda_names import DEVICE
from msa_train.plan.trace.fake_device import FakeDevice
from msa_train.plan.trace.parts import part_of
from msa_train.plan.trace.world import joined

GIB = 2**30
RANKS = 64
# of M3: https://huggingface.co/MiniMaxAI
M3 = ModelConfig(
    num_layers=1,
    hidden_size=6144,
    num_heads=64,
    num_kv_heads=4,
    vocab_size=1024,
    ffn_hidden_size=12288,
    num_dense_ffn_layers=0,
    num_experts=128,
    moe_router_topk=4,
    moe_ffn_hidden_size=3072,
    shared_expert_hidden_size=3072,
    layer_attention="full",
)
ROWS = (
    # tokens a rank, tokens a tile, rows that arrive relative to an equal share, grouped
    (16384, 0, 1.0, False),
    (16384, 0, 1.0, True),
    (16384, 4096, 1.0, True),
    (16384, 2048, 1.0, True),
    (16384, 2048, 1.3, True),
    (16384, 2048, 2.0, True),
    (65536, 0, 1.0, False),
    (65536, 4096, 1.0, True),
    (65536, 2048, 1.0, True),
    (65536, 2048, 1.3, True),
    (65536, 2048, 2.0, True),
)


def config_of(tile_tokens: int) -> RunConfig:
    """Make a run whose experts are spread over 64 ranks."""
    return RunConfig(
        model=M3,
        parallel=ParallelConfig(cp_size=RANKS, ep_size=RANKS),
        train=TrainConfig(precision=Precision.bf16, tile_tokens=tile_tokens),
    )


def build_layer(config: RunConfig) -> ExpertLayer:
    """Build the layer, weights without values."""
    megatron = build_transformer_config(config)
    spec = gpt._layer_spec(megatron, 1).submodules.mlp
    return ExpertLayer(megatron, spec.submodules, 1, get_default_pg_collection()).to(DEVICE)


def trace(tokens: int, tile_tokens: int, imbalance: float, *, grouped: bool) -> dict[str, Any]:
    """Return peak bytes of forward and backward of one recomputed layer, as its transformer layer does it."""
    config, begin = config_of(tile_tokens), time.monotonic()
    none = contextlib.nullcontext()
    one_by_one = none if grouped else patch.object(experts, "grouped_mm_for", lambda _device, _dtype: None)
    storages = FakeDevice(part_of)
    with (
        one_by_one,
        joined(config, RANKS, 0, DEVICE) as groups,
        answered(Assumptions(expert_imbalance=imbalance), storages, groups),
        storages,
    ):
        layer = build_layer(config).train()
        for parameter in layer.parameters():
            # as the engines do
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
            parameter.register_post_accumulate_grad_hook(_collect)
        static = storages.current
        x = torch.empty(tokens, 1, M3.hidden_size, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        grad, record, base = torch.empty_like(x), SelectionRecord(), storages.current

        def run(hidden: Tensor) -> Tensor:
            record.calls += 1
            layer.record = record
            return hidden + layer(hidden)[0]

        out: Any = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        forward = storages.peak.num_bytes
        storages.reset_peak()
        out.backward(grad)
        backward = storages.peak.num_bytes
    return {
        "tokens": tokens,
        "tile_tokens": tile_tokens,
        "imbalance": imbalance,
        "grouped": grouped,
        "weights_and_grads_gib": static / GIB,
        # input, output and the gradients of both, whatever happens inside
        "outside_gib": 2 * (base - static) / GIB,
        "forward_gib": (forward - static) / GIB,
        "backward_gib": (backward - static) / GIB,
        "seconds": time.monotonic() - begin,
    }


def _collect(parameter: Any) -> None:
    if not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad, parameter.grad_added_to_main_grad = None, False


def main(argv: list[str] | None = None) -> int:
    """Trace and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    rows = []
    for tokens, tile, imbalance, grouped in ROWS:
        rows.append(trace(tokens, tile, imbalance, grouped=grouped))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": command("benchmarks.moe.memory", sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    (arguments.out / "moe_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "moe_memory.md").write_text(markdown(result))
    return 0


def markdown(result: dict[str, Any]) -> str:
    """Write the table."""
    lines = [
        "# Peak memory of one MoE layer of M3, forward and backward, recomputed",
        "",
        f"`{result['command']}`, commit {result['machine']['commit']}, "
        f"torch {result['torch']}; traced, not run.",
        "GiB of one rank of 64 with 2 of 128 experts, without weights and their gradients. "
        "Inside: without the "
        "layer's input, output and the gradients of both. Imbalance: rows that arrive, to an equal share.",
        "",
        "| tokens a rank | tile | imbalance | experts | peak | inside |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peak = max(row["forward_gib"], row["backward_gib"])
        kind = "grouped" if row["grouped"] else "one by one"
        lines.append(
            f"| {row['tokens']:,} | {row['tile_tokens'] or 'none'} | {row['imbalance']} | {kind} "
            f"| {peak:.2f} | {peak - row['outside_gib']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
