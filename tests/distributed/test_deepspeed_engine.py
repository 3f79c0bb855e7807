"""engine=deepspeed does what one process of engine=torch does: losses, gradient norms and weights.

In fp32, as DeepSpeed reduces no fp64: sums in another order make up to 1e-6. An experts' mean in place of a
sum, or ranks left out of a group, would show as tens of percent. The whole product of stage, layout,
accumulation, exchange and recomputation: MATRIX=all pytest tests/distributed/test_deepspeed_engine.py
"""

import os
from functools import cache
from itertools import product
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from msa_train.config import KvExchange, Offload, Precision, Recompute
from tests.helpers import deepspeed_runs
from tests.helpers.deepspeed_runs import Case, worst_errors
from tests.helpers.spawn import run_ranks

TOLERANCE = 1e-6
full, selective, none = Recompute.full, Recompute.selective, Recompute.none

# Each zero_stage, layout, exchange and way of recomputing, and each pair of stage and accumulation (2 packs
# on 2 ranks of a sequence, or 4 on 2 sequences, are 2 a rank).
TWO_RANKS = [
    Case(0, 4),
    Case(0, 1, cp_size=2, recompute=full, exchange=KvExchange.ring),
    Case(1, 2, recompute=selective),
    Case(1, 2, cp_size=2, exchange=KvExchange.all_gather),
    Case(2, 4, recompute=full),
    Case(2, 1, cp_size=2, exchange=KvExchange.auto, overlap=True),
    Case(3, 2, cp_size=2, recompute=full, tile_tokens=16),
    Case(3, 2, cp_size=2, recompute=selective, offload_activations=True, overlap=True),
    Case(2, 2, cp_size=2, offload=Offload.cpu),
    Case(3, 2, cp_size=2, offload=Offload.cpu),
    # experts across the ranks of a sequence, and across sequences
    Case(1, 2, cp_size=2, ep_size=2),
    Case(2, 4, ep_size=2, tile_tokens=16),
]
RECIPES = [Case(stage, 2, cp_size=2, recipe=True) for stage in (0, 2, 3)]
FOUR_RANKS = [
    Case(0, 2, cp_size=4, ep_size=4),
    Case(1, 4, ep_size=2),
    Case(2, 4, cp_size=2, ep_size=4),
    Case(3, 2, cp_size=4, recompute=full),
]
BF16 = [
    Case(1, 4, ep_size=2, precision=Precision.bf16),
    Case(3, 4, precision=Precision.bf16),
    # sums of several packs that lie in host memory
    Case(2, 8, precision=Precision.bf16, offload=Offload.cpu),
]


EXCHANGES = [KvExchange.selected, KvExchange.all_gather, KvExchange.ring, KvExchange.auto]
# ranks, context-parallel ranks, exchange
LAYOUTS = [(2, 1, KvExchange.selected), *((cp, cp, exchange) for cp in (2, 4) for exchange in EXCHANGES)]


@cache
def one_process(packs: int, recipe: bool, precision: Precision) -> dict[str, Any]:
    case = Case(None, packs, recipe=recipe, precision=precision)
    return run_ranks(1, deepspeed_runs.run_cases, [case])[0][0]


def check(world_size: int, cases: list[Case]) -> None:
    got = run_ranks(world_size, deepspeed_runs.run_cases, cases)
    for number, case in enumerate(cases):
        want = one_process(case.packs, case.recipe, case.precision)
        for key, error in worst_errors([of_rank[number] for of_rank in got], want).items():
            assert error < TOLERANCE, (case, key)


def test_steps_are_those_of_one_process_on_two_ranks() -> None:
    check(2, TWO_RANKS)


def test_steps_are_those_of_one_process_on_four_ranks() -> None:
    check(4, FOUR_RANKS)


@pytest.mark.skipif(os.environ.get("MATRIX") != "all", reason="144 cases, for MATRIX=all")
@pytest.mark.parametrize(("ranks", "cp_size", "exchange"), LAYOUTS)
@pytest.mark.parametrize("zero_stage", range(4))
def test_product(ranks: int, cp_size: int, exchange: KvExchange, zero_stage: int) -> None:
    per_step = ranks // cp_size
    check(
        ranks,
        [
            Case(zero_stage, accumulation * per_step, cp_size=cp_size, exchange=exchange, recompute=recompute)
            for accumulation, recompute in product((1, 2), (none, full))
        ],
    )


def test_stages_freeze_what_they_freeze_in_one_process() -> None:
    check(2, RECIPES)


def test_zero3_never_has_the_model_whole() -> None:
    for of_rank in run_ranks(2, deepspeed_runs.elements_when_built, [2, 3]):
        (whole, there), (also_whole, parts) = of_rank
        assert whole == there == also_whole > 10_000
        assert parts == 0


def test_bf16_has_the_first_step_of_one_process_and_follows_it() -> None:
    """Gradients add up in fp32: the first norm agrees better than bf16 sums would."""
    got = run_ranks(2, deepspeed_runs.run_cases, BF16)
    for number, case in enumerate(BF16):
        want = one_process(case.packs, case.recipe, case.precision)
        steps = got[0][number]["steps"]
        assert steps[0]["loss"] == pytest.approx(want["steps"][0]["loss"], rel=1e-6), case
        assert steps[0]["norm"] == pytest.approx(want["steps"][0]["norm"], rel=1e-4), case
        for ours, theirs in zip(steps, want["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), case


def test_refused_step_leaves_everything_to_the_bit() -> None:
    cases = [
        Case(0, 2, ep_size=2),
        Case(1, 2, ep_size=2, precision=Precision.bf16),
        Case(2, 4, ep_size=2, precision=Precision.bf16),
        Case(1, 2, offload=Offload.cpu),
        Case(3, 4),
        Case(3, 2, offload=Offload.cpu),
    ]
    for of_rank in run_ranks(2, deepspeed_runs.refuse_steps, cases):
        for case, found in zip(cases, of_rank, strict=True):
            assert found == {"kept": True, "followed": True, "moves": True}, case
