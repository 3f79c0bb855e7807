"""Measure how far block selection with 8-bit index keys agrees with fp32; write a table and JSON.

python -m benchmarks.fp8_index_keys.run                    # trains a small model first, minutes on one core
python -m benchmarks.fp8_index_keys.run --steps 0          # random keys only, seconds
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from msa_kernels import DecodeCache, decode_attention, quantize_index_keys
from torch import Tensor

from benchmarks.fp8_index_keys.cases import Case, random_cases, trained_cases
from benchmarks.fp8_index_keys.report import markdown
from benchmarks.machine import ROOT, command, machine


def main(argv: list[str] | None = None) -> int:
    """Measure and write; exit code 2 on a bad command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the small model's training; 0: none")
    parser.add_argument("--packs", type=int, default=8, help="of held-out text that it reads")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    for name, least in (("steps", 0), ("packs", 1)):
        if getattr(arguments, name) < least:
            text = f"--{name}={getattr(arguments, name)}: must be at least {least}"
            print(f"fp8 index keys: error: {text}", file=sys.stderr)
            return 2
    start = time.monotonic()
    result: dict[str, Any] = {
        "command": command("benchmarks.fp8_index_keys.run", sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "cases": [_measure(case) for case in _cases(arguments.steps, arguments.packs)],
    }
    result["seconds"] = time.monotonic() - start
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fp8_index_keys.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (arguments.out / "fp8_index_keys.md").write_text(text)
    print(text)
    return 0


def _cases(steps: int, packs: int) -> Iterator[Case]:
    yield from random_cases()
    if steps:
        yield from trained_cases(steps, packs)


def _measure(case: Case) -> dict[str, Any]:
    """Measure the agreement of bf16 and fp8 keys with the case's own, over all its packs, and of fp8 both."""
    rows: dict[str, list[dict[str, Tensor]]] = {"bf16": [], "fp8": [], "fp8 both": []}
    for pack in case.packs:
        keys, scale = quantize_index_keys(pack.k)
        restored = {"bf16": pack.k.bfloat16().float(), "fp8": keys.float() * scale[:, None]}
        exact = case.select(pack, pack.k)
        _check_decoding(case, pack.q, keys, scale, case.select(pack, restored["fp8"]), pack.position)
        for name, other in restored.items():
            rows[name].append(case.compare(pack, exact, case.select(pack, other)))
        rows["fp8 both"].append(case.compare(pack, exact, case.select(pack, pack.k, fp8=True)))
    first = case.packs[0]
    return {
        "name": case.name,
        "what": case.what,
        "tokens": first.k.shape[0],
        "index_dim": first.k.shape[1],
        "block_size": case.block_size,
        "topk": case.topk,
        "queries": sum(pack.q.shape[0] * pack.q.shape[1] for pack in case.packs),
        "formats": {name: _summary(found) for name, found in rows.items()},
    }


def _summary(found: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Compute mean, lowest hundredth and worst of each figure over queries and groups."""
    summary = {}
    for name in found[0]:
        values = torch.cat([row[name].flatten() for row in found]).double()
        summary[name] = {
            "mean": float(values.mean()),
            "low_1_percent": float(values.quantile(0.01)),
            "worst": float(values.min()),
        }
    return summary


def _check_decoding(
    case: Case, q: Tensor, keys: Tensor, scale: Tensor, selected: Tensor, position: Tensor
) -> None:
    """Check that decoding the last query's token over an fp8 cache selects what was compared.

    Raises:
        RuntimeError: if it does not.
    """
    length = int(position[-1]) + 1
    empty = torch.zeros(1, keys.shape[0], q.shape[1], 1)
    cache = DecodeCache(empty, empty, keys[None], k_index_scale=scale[None])
    blocks = decode_attention(
        torch.zeros(1, q.shape[1], 1), q[-1:], cache, torch.tensor([length]),
        block_size=case.block_size, topk=case.topk,
    )[2]  # fmt: skip
    if not torch.equal(blocks[0], selected[-1]):
        raise RuntimeError(f"{case.name}: decoding selects {blocks[0].tolist()}, not {selected[-1].tolist()}")


if __name__ == "__main__":
    sys.exit(main())
