"""Compile what is going to be timed, several processes at a time, into Triton's cache; launch nothing.

Kernels are compiled anew for other constants, dtypes, and sizes that are 1 or no multiple of 16. Inputs here
are short, but alike in all of this.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.compiled_kernel import compile_only
from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.decode import decode_step
from benchmarks.gpu.layer import layer_forward, layer_step, make_inputs
from benchmarks.gpu.ours import groups_at_once
from benchmarks.gpu.patches import changed
from benchmarks.gpu.problem import make_index, select
from benchmarks.gpu.variants import BACKWARD, DECODE, FORWARD, SCORING, variants

# Tokens of the inputs: two portions of the backward, whose second adds to the first.
SEQ_LEN = 2**13
_LAUNCH_BACKWARD = "msa_kernels.block_sparse_attention.triton.launch_backward"


class CompilePart:
    """Make a share of all compilations."""

    def __init__(self, context: Context, share: int, num_shares: int, seq_lens: list[int]) -> None:
        self.context, self.share, self.num_shares, self.seq_lens = context, share, num_shares, seq_lens

    def steps(self) -> dict[str, Step]:
        """Return every num_shares-th call; none where there is no compiler: in the interpreter, in torch."""
        if not self.context.uses_graphs:
            return {}
        calls = list(compile_calls(self.context, self.seq_lens).items())[self.share :: self.num_shares]
        return {name: Step(lambda call=call: self._compile(call)) for name, call in calls}

    def _compile(self, call: Callable[[], object]) -> None:
        with compile_only():
            call()


def compile_calls(context: Context, seq_lens: list[int]) -> dict[str, Callable[[], object]]:
    """Return calls that together launch all kernels that the other parts time."""
    scale, sizes = context.scale, context.sizes
    groups = sorted({groups_at_once(sizes, n, scale.most_values) for n in seq_lens}, reverse=True)
    calls: dict[str, Callable[[], object]] = {}
    for count in groups:
        calls[f"layer, {count} groups"] = lambda count=count: _layer(context, count)
    for variant in variants(context):
        name = f"{variant.operator}, {variant.name}"
        if variant.operator == SCORING:
            calls[name] = lambda variant=variant: _scoring(context, variant.changes)
        if variant.operator == FORWARD:
            for count in groups:
                calls[f"{name}, {count} groups"] = lambda variant=variant, count=count: _layer(
                    context, count, variant.changes, backward=False
                )
        if variant.operator == BACKWARD:
            for count in groups:
                calls[f"{name}, {count} groups"] = lambda variant=variant, count=count: _layer(
                    context, count, variant.changes
                )
        if variant.operator == DECODE:
            calls[name] = lambda variant=variant: _decode(context, max(seq_lens), variant.changes)
    calls["scoring"] = lambda: _scoring(context, ())
    few = scale.topk_queries
    calls["scoring of few queries"] = lambda: select(
        make_index(context.tensors, sizes, scale.topk_seq_len), sizes, context.kernel, few
    )
    for seq_len in seq_lens:
        calls[f"decode at {seq_len}"] = lambda seq_len=seq_len: _decode(context, seq_len, ())
        calls[f"decode at {seq_len}, fp8"] = lambda seq_len=seq_len: decode_step(context, seq_len, fp8=True)()
    return calls


def _scoring(context: Context, changes: Any) -> None:
    """Compile scoring; long sequences have enough queries not to divide the keys among programs."""
    whole = ("msa_kernels.select_blocks.triton.launch", "_num_splits", lambda *_: 1)
    with changed((whole, *changes)):
        select(make_index(context.tensors, context.sizes, SEQ_LEN), context.sizes, context.kernel)


def _decode(context: Context, seq_len: int, changes: Any) -> None:
    with changed(changes):
        decode_step(context, seq_len)()


def _layer(context: Context, groups: int, changes: Any = (), *, backward: bool = True) -> None:
    """Compile forward alone, and forward and backward with the KL loss, in two portions."""
    sizes, tensors = context.sizes, context.tensors
    own = torch.arange(SEQ_LEN, device=context.device)[:, None, None] // sizes.block_size
    random = torch.rand(SEQ_LEN, groups, sizes.topk, generator=tensors.generator, device=context.device)
    inputs = make_inputs(tensors, sizes, make_index(tensors, sizes, SEQ_LEN), (random * (own + 1)).int())
    kv_block_bytes = sizes.heads_per_group * sizes.head_dim * tensors.element_bytes
    half = SEQ_LEN // 2 * groups * sizes.topk * kv_block_bytes
    with changed(((_LAUNCH_BACKWARD, "BACKWARD_PART_BYTES", half), *changes)):
        layer_forward(inputs, context.kernel)
        if backward:
            layer_step(inputs, context.kernel)
