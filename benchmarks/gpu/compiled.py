"""Tell what the Triton kernels compile to for an H100, in M3's shape: resources and instructions, no times.

    python -m benchmarks.gpu.compiled --out benchmarks/results
    python -m benchmarks.gpu.compiled --out benchmarks/results --before other/compiled.json

Needs Triton and no GPU; half a minute of one core per ten kernels. What other versions of Triton gave stays
in the files. With --before, figures that another commit's kernels gave stand beside these.
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.compiled_kernel import CompiledKernel, compile_for_hopper
from benchmarks.machine import ROOT, command, commit
from msa_train.simulate.reports.text import table

# M3: query heads of a KV head, KV heads, head dims, tokens of a block, slots
_G, _M, _D, _B, _K = 16, 4, 128, 128, 16
_SHOWN = ("MASKED", "ADD", "SPLIT", "CAUSAL", "FP8", "WITH_LSE")
_FIGURES = ("registers", "spilled_bytes", "shared_bytes", "programs", "instructions", "products")


def main(argv: list[str] | None = None) -> int:
    """Compile and write."""
    arguments = _parse(argv)
    how = command("benchmarks.gpu.compiled", sys.argv[1:] if argv is None else argv)
    # read when Triton is imported, so before: what is compiled for another reason is another matter
    os.environ["TRITON_INTERPRET"] = "0"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = rows_of(compile_for_hopper(launch_all))
    found: dict[str, Any] = {"command": how, "commit": commit(), "kernels": rows}
    if arguments.before is not None:
        found["before"] = json.loads(arguments.before.read_text())[version("triton")]
        found["before"].pop("before", None)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "compiled.json"
    # what other versions of Triton made of the kernels stays
    result = json.loads(path.read_text()) if path.exists() else {}
    result[version("triton")] = found
    path.write_text(json.dumps(dict(sorted(result.items(), reverse=True)), indent=1) + "\n")
    (arguments.out / "compiled.md").write_text(page(result))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--before", type=Path, help="compiled.json of another commit")
    return parser.parse_args(argv)


def launch_all() -> None:
    """Launch every kernel of a layer in M3's shape, and of decoding; values do not matter."""
    for launch in (_scoring, _attention, _dense_kl, _decode):
        launch()


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _scoring() -> None:
    from msa_kernels.select_blocks.triton.launch import select_blocks_triton
    from msa_kernels.select_blocks.types import SelectionArgs

    q, k, starts = _zeros(1024, _M, _D), _zeros(8192, _D), torch.tensor([0, 8192])
    for scale in (None, 0.1):
        args = SelectionArgs(
            q, k, starts, block_size=_B, topk=_K, return_lse=scale is not None, index_scale=scale
        )
        select_blocks_triton(args, num_splits=1)
        select_blocks_triton(args, num_splits=2)
    # older commits have none
    if hasattr(args, "in_fp8"):
        args = SelectionArgs(q, k, starts, block_size=_B, topk=_K)
        select_blocks_triton(args.in_fp8(restored=False), num_splits=1)


def _attention() -> None:
    """Forward, and backward with the KL loss in two portions, the second of which adds to the first."""
    from msa_kernels.block_sparse_attention import triton
    from msa_kernels.block_sparse_attention.triton import launch_backward
    from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, SparseQueries

    T, num_blocks = 256, 8
    queries = SparseQueries(
        q=_zeros(T, _M, _G, _D),
        position=torch.arange(T),
        softmax_scale=_D**-0.5,
        q_index=_zeros(T, _M, _D),
        k_index=_zeros(num_blocks, _B, _D),
        index_scale=_D**-0.5,
    )
    pool = BlockPool(_zeros(_M * num_blocks, 2, _B, _D), torch.arange(num_blocks).repeat(_M))
    block_table = torch.zeros(T, _M, _K, dtype=torch.int64)
    merged = triton.forward(queries, pool, block_table)
    assert merged.lse_index is not None, "there is an index branch"
    dout = queries.q
    # kernels of older commits have none
    delta = triton.output_delta(dout, dout) if hasattr(triton, "output_delta") else merged.lse
    bytes_of_a_query = _M * _K * (_G * _D * 2 + 4 * _B + 2 * _D)
    before = launch_backward.BACKWARD_PART_BYTES
    launch_backward.BACKWARD_PART_BYTES = T // 2 * bytes_of_a_query
    try:
        term = KlTerm(merged.lse_index, weight=1.0)
        triton.backward(queries, pool, block_table, dout, delta, merged.lse, term)
        # older commits form the value always
        if hasattr(term, "with_value"):
            term.with_value = False
            triton.backward(queries, pool, block_table, dout, delta, merged.lse, term)
    finally:
        launch_backward.BACKWARD_PART_BYTES = before


def _dense_kl() -> None:
    from msa_kernels.dense_kl.triton import launch

    T = 512
    q, k, q_index, k_index = _zeros(_M, _G, T, _D), _zeros(_M, T, _D), _zeros(_M, T, _D), _zeros(T, _D)
    scale = _D**-0.5
    lse = launch.lse_part(q, k, causal=True, softmax_scale=scale)
    lse_index = launch.lse_part(q_index[:, None], k_index[None], causal=True, softmax_scale=scale)[:, 0]
    scales = {"softmax_scale": scale, "index_scale": scale}
    inputs = (q, k, lse, q_index, k_index, lse_index)
    launch.dense_kl_part(*inputs, causal=True, **scales)
    # older commits form the value always
    if "with_value" in inspect.signature(launch.dense_kl_part).parameters:
        launch.dense_kl_part(*inputs, causal=True, with_value=False, **scales)


def _decode() -> None:
    from msa_kernels import quantize_index_keys
    from msa_kernels.decode.cache import DecodeCache
    from msa_kernels.decode.triton.launch import decode_attention_triton

    S = 2**15
    k, k_index = _zeros(1, S, _M, _D), _zeros(1, S, _D)
    keys, scale = quantize_index_keys(k_index)
    q, q_index, lens = _zeros(1, _M * _G, _D), _zeros(1, _M, _D), torch.tensor([S], dtype=torch.int32)
    for cache in (DecodeCache(k, k, k_index), DecodeCache(k, k, keys, k_index_scale=scale)):
        decode_attention_triton(
            q, q_index, cache, lens, block_size=_B, topk=_K, local_blocks=1, softmax_scale=_D**-0.5
        )


def rows_of(kernels: list[CompiledKernel]) -> dict[str, dict[str, Any]]:
    """Describe each kernel under a name that says which variant it is, in the order of launches.

    Of equal names, whose arguments differ in nothing that is shown, the most of each figure is kept.
    """
    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        shown = [name.lower() for name in _SHOWN if kernel.constants.get(name) is True]
        if kernel.constants.get("WITH_VALUE") is False:
            shown.append("gradients alone")
        name = ", ".join([kernel.name.removesuffix("_kernel"), *shown])
        instructions, products = kernel.main_loop
        figures = (
            kernel.registers, kernel.stack_bytes, kernel.shared_bytes, kernel.programs, instructions, products
        )  # fmt: skip
        row = {"tile": _tile(kernel), **dict(zip(_FIGURES, figures, strict=True))}
        known = rows.setdefault(name, row)
        known["programs"] = min(known["programs"], row["programs"])
        for figure in set(_FIGURES) - {"programs"}:
            known[figure] = max(known[figure], row[figure])
    return rows


def _tile(kernel: CompiledKernel) -> str:
    constants = kernel.constants
    size = " x ".join(str(constants[key]) for key in ("ROWS", "KEYS") if key in constants)
    stages = constants.get("STAGES")
    parts = [size, f"{kernel.num_warps} warps", "" if stages is None else f"{stages} stages"]
    return ", ".join(part for part in parts if part)


def page(result: dict[str, Any]) -> str:
    """Write a table for each version of Triton."""
    text = (
        "# What the kernels compile to\n\n"
        "M3's shape in bf16 for compute capability 9.0. Registers and spilled bytes are a thread's, shared "
        "memory a program's, programs those that a multiprocessor runs at a time, instructions and products "
        "(wgmma) a warp's in a step of the main loop, which takes the tile's rows and keys. Nothing is "
        "timed.\n"
    )
    for triton, found in sorted(result.items(), reverse=True):
        before = found.get("before")
        rows = [["kernel", "tile", *(figure.replace("_", " ") for figure in _FIGURES)]]
        for name, row in found["kernels"].items():
            old = None if before is None else before["kernels"].get(name)
            figures = (_change(row[key], None if old is None else old[key]) for key in ("tile", *_FIGURES))
            rows.append([name, *figures])
        text += f"\n## Triton {triton}\n\n`{found['command']}`, commit {found['commit']}."
        if before is not None:
            text += f" Where a figure is another at commit {before['commit']}, that stands first."
        text += "\n\n" + "\n".join(table(rows)) + "\n"
    return text


def _change(now: Any, before: Any) -> str:
    return str(now) if before in (None, now) else f"{before} → {now}"


if __name__ == "__main__":
    sys.exit(main())
