"""Measure the tiled loss against nothing but its matrix products; write a table and JSON.

    python -m benchmarks.cross_entropy.run --out benchmarks/results

The loss needs one product forward (logits) and three backward (logits again, gradients of hidden states and
weight). Both are timed in turns, in one process with one thread, on the same tensors; the best of the rounds
counts. Tiles are made small enough that sums over tiles are formed both ways, as at full size.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import ROOT, command, machine
from msa_train.model.layers import cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, HIDDEN, WORDS = 2048, 6144, 16384
TILE_ROWS, TILE_WORDS = 1024, 4096
IGNORE = -100


class OneRank:
    """Stand for a tensor-parallel group of one."""

    def rank(self) -> int:
        """Return 0."""
        return 0

    def size(self) -> int:
        """Return 1."""
        return 1


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    cross_entropy._TILE_ROWS, cross_entropy._TILE_ELEMENTS = TILE_ROWS, TILE_ROWS * TILE_WORDS
    result: dict[str, Any] = {
        "command": command("benchmarks.cross_entropy.run", sys.argv[1:] if argv is None else argv),
        "machine": machine() | {"torch": torch.__version__},
        "shape": {"tokens": TOKENS, "hidden": HIDDEN, "words": WORDS},
        "tile": {"tokens": TILE_ROWS, "words": TILE_WORDS},
        "rows": [_measure(name, arguments.rounds) for name in DTYPES],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cross_entropy.json").write_text(json.dumps(result, indent=1) + "\n")
    text = _markdown(result)
    (arguments.out / "cross_entropy.md").write_text(text)
    print(text)
    return 0


def _measure(name: str, rounds: int) -> dict[str, Any]:
    """Time ours, the bare products and torch's loss over whole logits, in turns; seconds."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(DTYPES[name]).requires_grad_()
    weight = (torch.randn(WORDS, HIDDEN, generator=generator) * 0.02).to(DTYPES[name]).requires_grad_()
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    dlogits = torch.randn(TOKENS, WORDS, generator=generator).to(DTYPES[name])

    def ours() -> Tensor:
        return cross_entropy.linear_cross_entropy(hidden, weight, labels, IGNORE, OneRank())  # type: ignore[arg-type]

    def plain() -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    def three_products() -> None:
        with torch.no_grad():
            _ = hidden @ weight.T, dlogits @ weight, dlogits.T @ hidden

    @torch.no_grad()
    def one_product() -> None:
        _ = hidden @ weight.T

    best: dict[str, float] = {}
    for _ in range(rounds):
        _keep_best(best, "product_forward", one_product)
        _keep_best(best, "products_backward", three_products)
        for rival, loss in (("ours", ours), ("torch", plain)):
            value: list[Tensor] = []
            _keep_best(best, f"{rival}_forward", lambda loss=loss, value=value: value.append(loss()))
            _keep_best(
                best,
                f"{rival}_backward",
                lambda value=value: torch.autograd.grad(value[0].sum(), (hidden, weight)),
            )
    return {"dtype": name} | best


def _keep_best(best: dict[str, float], name: str, call: Callable[[], object]) -> None:
    start = time.perf_counter()
    call()
    best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)


def _markdown(result: dict[str, Any]) -> str:
    shape, tile, where = result["shape"], result["tile"], result["machine"]
    lines = [
        "# The loss against its matrix products",
        "",
        f"`{result['command']}`, commit {where['commit']}, one thread of {where['cpu']}, torch "
        f"{where['torch']}. {shape['tokens']} tokens, hidden size {shape['hidden']}, {shape['words']} words, "
        f"in tiles of {tile['tokens']} x {tile['words']}. Best of the rounds, measured in turns.",
        "",
        "| dtype | pass | products alone | ours | ratio | torch, whole logits |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for name, products in (("forward", "product_forward"), ("backward", "products_backward")):
            ours, bare = row[f"ours_{name}"], row[products]
            lines.append(
                f"| {row['dtype']} | {name} | {bare:.2f} s | {ours:.2f} s | {ours / bare:.2f} | "
                f"{row[f'torch_{name}']:.2f} s |"
            )
        both = row["product_forward"] + row["products_backward"]
        total = row["ours_forward"] + row["ours_backward"]
        rival = row["torch_forward"] + row["torch_backward"]
        lines.append(
            f"| {row['dtype']} | both | {both:.2f} s | {total:.2f} s | {total / both:.2f} | {rival:.2f} s |"
        )
    lines += [
        "",
        "Forward is one product, backward three, as logits are formed again; torch keeps them whole and "
        "forms two. In bf16 a CPU has no product with fp32 results, so sums over tiles are formed from "
        "operands in fp32, which this processor multiplies at less than half the speed; GPUs have that "
        "product. Where a rank has at most 8,192 tokens and the vocabulary fits one tile, nothing is summed.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
