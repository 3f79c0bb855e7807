"""What the GPU benchmark compiles ahead is what it then launches, kernel by kernel, compiled for Hopper here.

Takes minutes: MSA_KERNELS_COMPILE_ALL=1 asks for it.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.triton_env import CompiledKernel, compiled_kernels, needs_triton

# Queries of 4, 2 and 1 groups, in lengths that a CPU can hold; compiled ahead for these numbers of groups.
LENGTHS = {4: 2**15, 2: 2**16, 1: 2**17}
COMPILED_FOR = [2**15, 2**17, 2**19, 2**20]
DECODE_LENGTHS = [2**15, 2**17]


def _context(folder: str) -> Any:
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.records import Records

    context = Context(Records(Path(folder)), "cpu", "triton", 1, math.inf, smoke=False)
    # values do not decide what is compiled, and random ones take a minute
    context.tensors.normal = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    return context


def _as_on_a_gpu() -> Any:
    """Take Triton on the CPU too: nothing is launched."""
    from benchmarks.gpu.patches import changed

    sparse = ("block_sparse_attention.choice", "block_sparse_attention.across_pools")
    operators = ("select_blocks.op", *sparse, "decode.op")
    return changed([(f"msa_kernels.{name}", "choose_kernel", lambda *_: "triton") for name in operators])


def ahead(folder: str) -> None:
    """All that is compiled before anything is timed."""
    from benchmarks.gpu.compile_kernels import compile_calls

    context = _context(folder)
    with _as_on_a_gpu():
        for name, call in compile_calls(context, COMPILED_FOR).items():
            if not name.startswith("decode at") or name.split()[2].strip(",") in map(str, DECODE_LENGTHS):
                call()


def later(folder: str) -> None:
    """What the timed parts call, at their own lengths."""
    from benchmarks.gpu.decode import decode_step
    from benchmarks.gpu.layer import layer_forward, layer_step, make_inputs
    from benchmarks.gpu.problem import make_index, select
    from benchmarks.gpu.variants import variants

    context = _context(folder)
    assert {variant.operator for variant in variants(context)} == {
        "scoring",
        "sparse forward",
        "sparse backward + KL",
        "decode",
    }
    with _as_on_a_gpu():
        for groups, seq_len in LENGTHS.items():
            index = make_index(context.tensors, context.sizes, seq_len)
            select(index, context.sizes, "triton")
            own = torch.arange(seq_len)[:, None, None] // context.sizes.block_size
            ids = (torch.rand(seq_len, groups, context.sizes.topk) * (own + 1)).int()
            inputs = make_inputs(context.tensors, context.sizes, index, ids)
            layer_forward(inputs, "triton")
            layer_step(inputs, "triton")
            del inputs
        few = make_index(context.tensors, context.sizes, context.scale.topk_seq_len)
        select(few, context.sizes, "triton", context.scale.topk_queries)
        for seq_len in DECODE_LENGTHS:
            decode_step(context, seq_len)()
            decode_step(context, seq_len, fp8=True)()


@needs_triton
@pytest.mark.skipif(not os.environ.get("MSA_KERNELS_COMPILE_ALL"), reason="takes minutes")
def test_nothing_is_compiled_while_times_are_taken(tmp_path: Path) -> None:
    before = {kernel.ptx for kernel in compiled_kernels(ahead, str(tmp_path))}
    used: list[CompiledKernel] = compiled_kernels(later, str(tmp_path))
    late = [(kernel.name, kernel.constants) for kernel in used if kernel.ptx not in before]
    print(f"{len(before)} kernels are compiled ahead, {len(used)} used as shipped")
    assert late == []
