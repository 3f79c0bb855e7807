"""Check and time tile sizes and divisions of the work that may be faster than the shipped ones.

They stand in `configs.py` of the operators, as candidates; what is fastest belongs first in the tables there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from msa_kernels.block_sparse_attention import configs as sparse_configs
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm
from msa_kernels.decode import configs as decode_configs
from msa_kernels.select_blocks import configs as select_configs
from torch import Tensor

from benchmarks.gpu import layer
from benchmarks.gpu.check import check_cases
from benchmarks.gpu.check_attention import QUERIES_FIRST
from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.decode import decode_step
from benchmarks.gpu.ours import checks_of_attention, groups_at_once
from benchmarks.gpu.patches import Change, changed
from benchmarks.gpu.problem import CORRELATED, GroupProblem, IndexBranch, make_groups, make_index, select
from benchmarks.gpu.rows import Row

SCORING, FORWARD, BACKWARD, DECODE = "scoring", "sparse forward", "sparse backward + KL", "decode"
SHIPPED = "as shipped"
_SELECT = "msa_kernels.select_blocks"
_SPARSE = "msa_kernels.block_sparse_attention"
_DECODE = "msa_kernels.decode"
_QUERIES_FIRST = "queries first"
NUM_SPLITS = (1, 8, 16)


@dataclass(frozen=True, slots=True)
class Variant:
    """Describe one operator with other constants."""

    operator: str
    name: str
    changes: tuple[Change, ...] = ()
    group: str = ""
    """Of the checks."""


def variants(context: Context) -> list[Variant]:
    """Return all of them, by operator, each operator as shipped first; none where kernels are torch's."""
    if context.kernel != "triton":
        return []
    found = [Variant(SCORING, SHIPPED, (), "selection")]
    for config in select_configs.CANDIDATES:
        tile = f"{config.rows}x{config.keys}, {config.num_warps} warps, {config.num_stages} stages"
        found.append(Variant(SCORING, tile, ((f"{_SELECT}.configs", "MAIN", (config,)),), "selection"))
    for count in NUM_SPLITS:
        change = (f"{_SELECT}.triton.launch", "_num_splits", lambda *_, count=count: count)
        found.append(Variant(SCORING, f"keys divided by {count}", (change,), "selection"))
    found.append(Variant(FORWARD, SHIPPED, (), "attention"))
    configs, share = f"{_SPARSE}.configs", "UNION_SHARE"
    found.append(Variant(FORWARD, "blocks first", ((configs, share, 0.0),), "attention"))
    for config in (*sparse_configs.UNION[:1], *sparse_configs.UNION_CANDIDATES):
        tile = f"{_QUERIES_FIRST}, {config.rows} rows, {config.num_warps} warps, {config.num_stages} stages"
        change = ((configs, share, math.inf), (configs, "UNION", (config,)))
        found.append(Variant(FORWARD, tile, change, "attention"))
    found.append(Variant(BACKWARD, SHIPPED, (), "attention"))
    for name, part in (("ATTEND_BACKWARD", "attention"), ("KL_BACKWARD", "KL loss")):
        for config in getattr(sparse_configs, f"{name}_CANDIDATES"):
            table = (config, *getattr(sparse_configs, name))
            tile = f"{part}: {config.rows} rows, {config.num_warps} warps, {config.num_stages} stages"
            found.append(Variant(BACKWARD, tile, ((configs, name, table),), "attention"))
    without_value: Change = (layer.__name__, "WITH_KL_VALUE", False)
    found.append(Variant(BACKWARD, "without the loss's value", (without_value,), "attention"))
    found.append(Variant(DECODE, SHIPPED, (), "decode"))
    for config in decode_configs.CANDIDATES:
        name = f"{config.blocks_per_program} blocks per program"
        found.append(Variant(DECODE, name, ((f"{_DECODE}.configs", "MAIN", config),), "decode"))
    return found


class VariantsPart:
    """Time all variants at one length."""

    def __init__(self, context: Context, seq_len: int) -> None:
        self.context, self.seq_len = context, seq_len

    def steps(self) -> dict[str, Step]:
        """Return a step for each, which checks it and then times it."""
        return {
            f"{variant.operator}, {variant.name}": Step(
                lambda variant=variant: self._measure(variant),
                self._checks_of(variant),
                need_s=lambda variant=variant: self._need_s(variant),
            )
            for variant in variants(self.context)
        }

    def _checks_of(self, variant: Variant) -> tuple[str, ...]:
        """Name the checks of the operator as shipped; where it is wrong no other tiles are of interest."""
        if variant.group != "attention":
            return (variant.group,)
        return checks_of_attention(0, backward=variant.operator == BACKWARD)

    def _need_s(self, variant: Variant) -> float:
        shorter = self.context.shorter(variant.operator, self.seq_len)
        if shorter is None or variant.operator == DECODE:
            return 0.0
        length, once = shorter
        return 3 * once * (self.seq_len / length) ** (2 if variant.operator == SCORING else 1)

    @property
    def _seconds_of(self) -> dict[str, Callable[[], float]]:
        return {
            SCORING: self._scoring_s,
            FORWARD: self._forward_s,
            BACKWARD: self._backward_s,
            DECODE: self._decode_s,
        }

    def _measure(self, variant: Variant) -> None:
        with changed(variant.changes):
            if variant.name != SHIPPED:
                self._check(variant)
            seconds = self._seconds_of[variant.operator]()
        row = Row(f"{variant.operator}, {variant.name}", self.seq_len, seconds)
        if variant.name != SHIPPED:
            row.rival, row.rival_s = SHIPPED, self._shipped_s(variant)
        self.context.add(row)

    def _check(self, variant: Variant) -> None:
        """Raise where a result is wrong: then it is not timed."""
        scale = self.context.scale
        cases = check_cases(
            variant.group, self.context.tensors, self.context.sizes, self.context.kernel,
            seq_len=scale.check_seq_len, num_queries=scale.check_queries,
        )  # fmt: skip
        # the first two: as it is, and cut in parts
        for case in [cases[QUERIES_FIRST]] if _QUERIES_FIRST in variant.name else list(cases.values())[:2]:
            for check in case():
                if not check.passed:
                    raise ValueError(
                        f"{check.name}: error {check.error:.3g} of {check.allowed:.3g} {check.text}"
                    )

    def _shipped_s(self, variant: Variant) -> float:
        return self.context.seconds_of(f"{variant.operator}, {SHIPPED}", self.seq_len)

    @cached_property
    def _index(self) -> IndexBranch:
        return make_index(self.context.tensors, self.context.sizes, self.seq_len)

    def _scoring_s(self) -> float:
        context = self.context
        _ = self._index
        return context.clock.seconds(lambda: select(self._index, context.sizes, context.kernel))

    @cached_property
    def _alike(self) -> tuple[Any, ...]:
        """Make the forward's arguments, of neighbours that select alike: for others blocks go first."""
        index = make_index(self.context.tensors, self.context.sizes, self.seq_len, CORRELATED)
        problem = self._problem(index, with_kl=False)
        return problem.queries, problem.pool, problem.block_table

    def _forward_s(self) -> float:
        arguments = self._alike
        return self._seconds_of_all(lambda: pool_forward(*arguments, kernel=self.context.kernel))

    @cached_property
    def _backward(self) -> tuple[Any, ...]:
        """Make the arguments of the backward, the same for all variants, of as many groups as fit."""
        context = self.context
        problem = self._problem(self._index, with_kl=True)
        part = pool_forward(problem.queries, problem.pool, problem.block_table, kernel=context.kernel)
        assert part.lse_index is not None, "made with an index branch"
        delta = output_delta(problem.dout, part.out.to(problem.dout.dtype), kernel=context.kernel)
        term = KlTerm(part.lse_index, weight=1.0)
        return problem.queries, problem.pool, problem.block_table, problem.dout, delta, part.lse, term

    def _backward_s(self) -> float:
        *arguments, term = self._backward
        term = replace(term, with_value=layer.WITH_KL_VALUE)
        return self._seconds_of_all(lambda: pool_backward(*arguments, term, kernel=self.context.kernel))

    @property
    def _groups(self) -> int:
        """Count the KV groups that fit the memory together."""
        return groups_at_once(self.context.sizes, self.seq_len, self.context.scale.most_values)

    def _problem(self, index: IndexBranch, *, with_kl: bool) -> GroupProblem:
        context = self.context
        ids: Tensor = select(index, context.sizes, context.kernel)[:, : self._groups].contiguous()
        return make_groups(context.tensors, context.sizes, index, ids, with_kl=with_kl)

    def _seconds_of_all(self, call: Callable[[], object]) -> float:
        """Time a call for the groups that fit, times what all of them would take."""
        return self.context.clock.seconds(call) * self.context.sizes.num_kv_heads / self._groups

    def _decode_s(self) -> float:
        return self.context.short_seconds(DECODE, decode_step(self.context, self.seq_len))[0]
