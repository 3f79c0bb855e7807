"""Scores through every engine are those of one torch process, and training goes on as if there were none."""

from typing import Any

import pytest

from msa_train.config import DeepSpeedConfig, EngineKind
from msa_train.evaluation.scoring.needle_rate import NeedleRate
from msa_train.evaluation.scoring.samples import score_samples
from msa_train.evaluation.undisturbed import undisturbed
from tests.distributed.test_evaluation_scores import made_samples
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.megatron_runs import build, train
from tests.helpers.spawn import run_ranks

# fp32 sums in another order
TOLERANCE = 1e-5
MEGATRON = EngineKind.megatron
CASES: dict[str, dict[str, Any]] = {
    "torch-cp2": {"engine": EngineKind.torch, "parallel": {"cp_size": 2, "ep_size": 2}},
    "megatron-tp2": {"engine": MEGATRON, "parallel": {"tp_size": 2}},
    "megatron-pp2": {"engine": MEGATRON, "parallel": {"pp_size": 2}},
    "megatron-pp2-interleaved": {"engine": MEGATRON, "parallel": {"pp_size": 2, "pp_layout": "1,1,1,1"}},
    "megatron-cp2": {"engine": MEGATRON, "parallel": {"cp_size": 2, "ep_size": 2}},
}


def steps_around_scores(_rank: int, _world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores before and after a step, and whether steps are the same without them."""
    cuda_shim.install()
    found: dict[str, Any] = {}
    for name, arguments in cases.items():
        engine = build(**arguments)
        rate = NeedleRate(engine.config, engine.groups, made_samples())
        scored: list[Any] = []
        rows = []
        for step in range(2):
            with undisturbed(engine):
                scored.append(score_samples(engine, made_samples(), needle_rate=rate if not step else None))
            rows.append(train(engine, step, 1))
        rates = rate.rates()
        leave_groups()
        plain = build(**arguments)
        alone = [train(plain, step, 1) for step in range(2)]
        leave_groups()
        found[name] = {
            "scores": [[(one.num_correct, one.nll) for one in scores] for scores in scored],
            "rates": rates,
            "same": [_without_times(one) for one in rows] == [_without_times(one) for one in alone],
        }
    return found


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("exposed", "memory"))}
        for row in rows
    ]


def compare(cases: dict[str, dict[str, Any]]) -> None:
    one = {"torch": {"engine": EngineKind.torch, "parallel": {}}}
    want = run_ranks(1, steps_around_scores, one)[0]["torch"]
    assert want["same"]
    for found in run_ranks(2, steps_around_scores, cases):
        for name, got in found.items():
            assert got["same"], name
            for ours, theirs in zip(got["scores"], want["scores"], strict=True):
                assert [one[0] for one in ours] == [one[0] for one in theirs], name
                assert [one[1] for one in ours] == pytest.approx([one[1] for one in theirs], rel=TOLERANCE)
            assert got["rates"].keys() == want["rates"].keys()
            for layer, rates in got["rates"].items():
                assert rates == pytest.approx(want["rates"][layer], abs=1e-9), (name, layer)


def test_torch_and_megatron() -> None:
    compare(CASES)


def test_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    settings = DeepSpeedConfig(zero_stage=3)
    parallel = {"cp_size": 2}
    compare({"deepspeed": {"engine": EngineKind.deepspeed, "parallel": parallel, "deepspeed": settings}})
