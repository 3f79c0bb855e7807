"""engine=megatron through the CUDA shim: tensor, pipeline and context parallelism equal one process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_train.config import EngineKind, Precision, Recompute
from tests.helpers import cuda_shim
from tests.helpers.megatron_runs import worker
from tests.helpers.spawn import run_ranks

# fp32: three steps of AdamW on sums in another order; seen to agree to six digits.
TOLERANCE = 1e-5
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "torch": (1, {"engine": EngineKind.torch, "parallel": {}}),
    "megatron": (1, {"engine": EngineKind.megatron, "parallel": {}}),
    "megatron-recompute": (
        1,
        {"engine": EngineKind.megatron, "parallel": {}, "recompute": Recompute.full},
    ),
    "megatron-dp2": (2, {"engine": EngineKind.megatron, "parallel": {}}),
    "megatron-tp2": (2, {"engine": EngineKind.megatron, "parallel": {"tp_size": 2}}),
    "megatron-tp2-ep2": (2, {"engine": EngineKind.megatron, "parallel": {"tp_size": 2, "ep_size": 2}}),
    "megatron-pp2": (2, {"engine": EngineKind.megatron, "parallel": {"pp_size": 2}}),
    "megatron-cp2-ep2": (2, {"engine": EngineKind.megatron, "parallel": {"cp_size": 2, "ep_size": 2}}),
    "torch-cp2-ep2": (2, {"engine": EngineKind.torch, "parallel": {"cp_size": 2, "ep_size": 2}}),
    "megatron-tp2-ep2-tiles": (
        2,
        {"engine": EngineKind.megatron, "parallel": {"tp_size": 2, "ep_size": 2}, "tile_tokens": 20},
    ),
    "megatron-cp2-overlap-tiles-recompute": (
        2,
        {
            "engine": EngineKind.megatron,
            "parallel": {
                "cp_size": 2,
                "ep_size": 2,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            "recompute": Recompute.full,
            "tile_tokens": 20,
        },
    ),
    "torch-cp2-tiles": (
        2,
        {"engine": EngineKind.torch, "parallel": {"cp_size": 2, "ep_size": 2}, "tile_tokens": 20},
    ),
    "torch-bf16": (1, {"engine": EngineKind.torch, "parallel": {}, "precision": Precision.bf16}),
    "megatron-bf16": (1, {"engine": EngineKind.megatron, "parallel": {}, "precision": Precision.bf16}),
}
PP2 = {"pp_size": 2}
CASES |= {
    "megatron-pp2-uneven": (2, {"engine": EngineKind.megatron, "parallel": {**PP2, "pp_layout": "1,3"}}),
    "megatron-pp2-interleaved": (
        2,
        {"engine": EngineKind.megatron, "parallel": {**PP2, "pp_layout": "1,1,1,1"}},
    ),
    "megatron-pp2-stages-offload": (
        2,
        {
            "engine": EngineKind.megatron,
            "parallel": PP2,
            "recompute_stages": "selective,full",
            "offload": True,
        },
    ),
    "torch-six": (1, {"engine": EngineKind.torch, "parallel": {}, "num_layers": 6}),
    "megatron-pp2-six": (
        2,
        {"engine": EngineKind.megatron, "parallel": {**PP2, "pp_layout": "1,2,2,1"}, "num_layers": 6},
    ),
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
for name, size, engine, parallel in (
    ("torch-recipe", 1, EngineKind.torch, {}),
    ("torch-cp2-recipe", 2, EngineKind.torch, {"cp_size": 2, "ep_size": 2}),
    ("megatron-recipe", 1, EngineKind.megatron, {}),
    ("megatron-dp2-overlap-recipe", 2, EngineKind.megatron, OVERLAP),
    ("megatron-cp2-ep2-overlap-recipe", 2, EngineKind.megatron, {"cp_size": 2, "ep_size": 2, **OVERLAP}),
    ("megatron-tp2-overlap-recipe", 2, EngineKind.megatron, {"tp_size": 2, "overlap_grad_reduce": True}),
    ("megatron-pp2-recipe", 2, EngineKind.megatron, PP2),
    ("megatron-pp2-interleaved-recipe", 2, EngineKind.megatron, {**PP2, **OVERLAP, "pp_layout": "1,1,1,1"}),
):
    CASES[name] = (size, {"engine": engine, "parallel": parallel, "recipe": True})


REFERENCES = ("torch", "torch-recipe", "torch-six")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("megatron")
    for world_size in (1, 2):
        cases = {name: arguments for name, (size, arguments) in CASES.items() if size == world_size}
        run_ranks(world_size, worker, cases, str(folder))
    return {name: torch.load(folder / name, weights_only=False) for name in CASES}


@pytest.mark.parametrize("name", [n for n in CASES if "bf16" not in n and n not in REFERENCES])
def test_same_training_as_one_torch_process(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    is_recipe = name.endswith("recipe")
    reference = "torch-recipe" if is_recipe else "torch-six" if name.endswith("six") else "torch"
    compared = 0
    for got, want in zip(rows[name], rows[reference], strict=True):
        for key in ("lm_loss", "kl_loss", "grad_norm", "val_loss"):
            if key in want:
                assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key
                compared += 1
        for key in ("tokens_per_expert_min", "tokens_per_expert_max"):
            assert got.get(key) == want.get(key)
    # Four steps of three and a validation; no KL loss in one of them.
    assert compared == (12 if is_recipe else 10)


@pytest.mark.parametrize(
    "name",
    ["recompute", "tp2", "tp2-ep2", "pp2", "pp2-uneven", "pp2-interleaved", "pp2-stages-offload", "cp2-ep2"],
)
def test_same_attention_metrics(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Groups cut over ranks, layers over stages, a recomputed layer: each query is counted once."""
    for got, want in zip(rows[f"megatron-{name}"][:-1], rows["torch"][:-1], strict=True):
        for key in ("block_recall", "score_recall", "score_recall_best", "attention_entropy"):
            assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key
            for layer, groups in want[f"{key}_by_layer"].items():
                assert got[f"{key}_by_layer"][layer] == pytest.approx(groups, rel=TOLERANCE), (key, layer)


def test_engines_agree_in_bf16(rows: dict[str, list[dict[str, Any]]]) -> None:
    """First loss and gradient norm are equal; later ones depend on how masters round to bf16."""
    got, want = rows["megatron-bf16"], rows["torch-bf16"]
    assert got[0]["lm_loss"] == want[0]["lm_loss"]
    assert got[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-6)
    for a, b in zip(got[1:-1], want[1:-1], strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=2e-3)


def test_shim_refuses_its_wrong_corners() -> None:
    right = {
        "virtual_pipeline_model_parallel_size": 2,
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": False,
    }
    cuda_shim.refuse_wrong_corners(SimpleNamespace(**right))
    with pytest.raises(NotImplementedError, match="interleaved"):
        cuda_shim.refuse_wrong_corners(SimpleNamespace(**right | {"batch_p2p_comm": True}))
    with pytest.raises(NotImplementedError, match="frees"):
        cuda_shim.refuse_wrong_corners(SimpleNamespace(**right | {"deallocate_pipeline_outputs": True}))
