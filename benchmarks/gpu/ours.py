"""Time our operators and of the whole layer's attention at one length."""

import gc
from collections.abc import Callable
from functools import cached_property

import torch
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm
from torch import Tensor

from benchmarks.gpu.check_attention import QUERIES_FIRST
from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.layer import LayerInputs, layer_forward, layer_step, make_inputs
from benchmarks.gpu.problem import (
    GroupProblem,
    IndexBranch,
    LayerSizes,
    distinct_blocks,
    make_groups,
    make_index,
    select,
)
from benchmarks.gpu.rows import INDEPENDENT, Row
from benchmarks.gpu.sampled import sampled_checks

# Calls of a step: one before those that count, those that count, and what they leave for another
_CALLS = 3


def groups_at_once(sizes: LayerSizes, seq_len: int, most_values: int) -> int:
    """Return how many KV groups' queries, outputs and gradients fit the memory together."""
    return max(1, min(sizes.num_kv_heads, most_values // (seq_len * sizes.heads_per_group * sizes.head_dim)))


def checks_of_attention(groups: int, *, backward: bool) -> tuple[str, ...]:
    """Return the checks that attention of so many KV groups must have passed to be timed."""
    cases = ("attention", "attention, portions, split lists")
    if groups in (1, 2):
        cases += (f"attention, {'one group' if groups == 1 else 'two groups'}",)
    return cases if backward else tuple(f"{case}: out" for case in cases)


class OursPart:
    """Time selection, attention and the whole layer on one document, for one kind of selection.

    Where not all KV groups fit the memory, some are timed and the time is multiplied: groups share no work
    in the attention. The selection is always timed as a whole.
    """

    def __init__(self, context: Context, seq_len: int, selection: str) -> None:
        self.context, self.seq_len, self.selection = context, seq_len, selection
        self.groups = groups_at_once(context.sizes, seq_len, context.scale.most_values)
        self.factor = context.sizes.num_kv_heads / self.groups

    def steps(self) -> dict[str, Step]:
        """Return the operators, then prefill and training step as a layer runs them."""
        after = ("scoring",)
        # neighbours that select alike may go queries first
        first = () if self.selection == INDEPENDENT else (f"{QUERIES_FIRST}: out",)
        forward = ("selection", *first, *checks_of_attention(self.groups, backward=False))
        backward = ("selection", *first, *checks_of_attention(self.groups, backward=True))
        forward_s, backward_s = self._need("sparse forward", 1), self._need("sparse backward + KL", 1)
        steps = {
            "scoring": Step(self._scoring, ("selection",), need_s=self._need("scoring", 2)),
            "sparse forward": Step(self._forward, forward, after, forward_s),
            "sparse backward + KL": Step(self._backward, backward, after, backward_s),
            "prefill": Step(self._prefill, forward, after, forward_s),
            "training step": Step(self._training, backward, after, backward_s),
        }
        if self.selection == INDEPENDENT:
            steps["sampled checks"] = Step(self._sampled, backward, after)
        return steps

    def _need(self, what: str, power: int) -> Callable[[], float]:
        def seconds() -> float:
            shorter = self.context.shorter(what, self.seq_len)
            if shorter is None:
                return 0.0
            length, once = shorter
            return _CALLS * once * (self.seq_len / length) ** power

        return seconds

    @cached_property
    def _index(self) -> IndexBranch:
        return make_index(self.context.tensors, self.context.sizes, self.seq_len, self.selection)

    @cached_property
    def _ids(self) -> Tensor:
        """Select the blocks, [S, M, K] int32."""
        return select(self._index, self.context.sizes, self.context.kernel)

    @cached_property
    def _num_pairs(self) -> int:
        """Count the pairs of (query, group) and block, of all groups."""
        return int((self._ids >= 0).sum())

    @property
    def _some_ids(self) -> Tensor:
        return self._ids[:, : self.groups].contiguous()

    def _problem(self, *, with_kl: bool) -> GroupProblem:
        return make_groups(
            self.context.tensors, self.context.sizes, self._index, self._some_ids, with_kl=with_kl
        )

    def _inputs(self) -> LayerInputs:
        return make_inputs(self.context.tensors, self.context.sizes, self._index, self._some_ids)

    def _add(self, what: str, seconds: float, flops: float, num_bytes: float | None) -> None:
        row = Row(what, self.seq_len, seconds, self.selection, flops=flops, num_bytes=num_bytes)
        row.distinct, row.peak_gib = distinct_blocks(self._ids), self.context.clock.peak_gib()
        self.context.add(row)

    def _scoring(self) -> None:
        context = self.context
        _ = self._index
        seconds = context.clock.seconds(lambda: select(self._index, context.sizes, context.kernel))
        self._add("scoring", seconds, context.sizes.scoring_flops(self.seq_len), None)

    def _forward(self) -> None:
        problem, sizes = self._problem(with_kl=False), self.context.sizes
        seconds = self.context.clock.seconds(
            lambda: pool_forward(
                problem.queries, problem.pool, problem.block_table, kernel=self.context.kernel
            )
        )
        flops = self._num_pairs * sizes.pair_flops()
        num_bytes = sizes.forward_bytes(self._num_pairs, self.context.tensors.element_bytes)
        self._add("sparse forward", self.factor * seconds, flops, num_bytes)

    def _backward(self) -> None:
        problem, sizes, kernel = self._problem(with_kl=True), self.context.sizes, self.context.kernel
        part = pool_forward(problem.queries, problem.pool, problem.block_table, kernel=kernel)
        assert part.lse_index is not None, "made with an index branch"
        term = KlTerm(part.lse_index, weight=1.0)
        delta = output_delta(problem.dout, part.out.to(problem.dout.dtype), kernel=kernel)
        arguments = (problem.queries, problem.pool, problem.block_table, problem.dout, delta, part.lse, term)
        del part, delta, problem
        seconds = self.context.clock.seconds(lambda: pool_backward(*arguments, kernel=kernel))
        flops = self._num_pairs * (2.5 * sizes.pair_flops() + sizes.kl_pair_flops())
        num_bytes = sizes.backward_bytes(self._num_pairs, self.context.tensors.element_bytes)
        self._add("sparse backward + KL", self.factor * seconds, flops, num_bytes)

    def _scoring_s(self) -> float:
        return self.context.seconds_of("scoring", self.seq_len, self.selection)

    def _prefill(self) -> None:
        inputs, sizes = self._inputs(), self.context.sizes
        seconds = self.context.clock.seconds(lambda: layer_forward(inputs, self.context.kernel))
        flops = sizes.scoring_flops(self.seq_len) + self._num_pairs * sizes.pair_flops()
        self._add("prefill", self._scoring_s() + self.factor * seconds, flops, None)
        if self.factor > 1:
            self.context.note(
                f"{self.seq_len} tokens: attention of {self.groups} of {sizes.num_kv_heads} KV groups timed "
                "and multiplied; queries and gradients of all do not fit the memory together"
            )

    def _training(self) -> None:
        inputs, sizes = self._inputs(), self.context.sizes
        seconds = self.context.clock.seconds(lambda: layer_step(inputs, self.context.kernel))
        flops = self._num_pairs * (3.5 * sizes.pair_flops() + sizes.kl_pair_flops())
        flops += sizes.scoring_flops(self.seq_len)
        self._add("training step", self._scoring_s() + self.factor * seconds, flops, None)

    def _sampled(self) -> None:
        gc.collect()
        inputs = make_inputs(
            self.context.tensors, self.context.sizes, self._index, self._ids[:, :1].contiguous()
        )
        for check in sampled_checks(inputs, self._index, self.context.kernel):
            self.context.add_check(f"at {self.seq_len}", check)
        torch.cuda.empty_cache()
