"""Smaller gradients and optimizer states on both engines: what keeps bits, what changes losses a little."""

from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.config import EngineKind, GradsDtype, MomentsDtype, Precision
from msa_train.training.optim.megatron_update import MegatronUpdate
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.megatron_runs import build, train
from tests.helpers.resume_runs import SAVED_STEP, Case, Layout, run_cases
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

TORCH, MEGATRON = EngineKind.torch, EngineKind.megatron
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offload": {"offload": 0.5},
    "moments-bf16": {"moments_dtype": MomentsDtype.bf16},
    "moments-fp8": {"moments_dtype": MomentsDtype.fp8},
    "moments-fp8-offload": {"moments_dtype": MomentsDtype.fp8, "offload": 1.0},
    "grads-bf16": {"grads_dtype": GradsDtype.bf16},
    "grads-bf16-offload": {"grads_dtype": GradsDtype.bf16, "offload": 0.5},
}
# ranks, engine, sizes
LAYOUTS: dict[str, tuple[int, EngineKind, dict[str, int]]] = {
    "torch": (1, TORCH, {}),
    "torch-cp2-ep2": (2, TORCH, {"cp_size": 2, "ep_size": 2}),
    "megatron-dp2": (2, MEGATRON, {}),
    "megatron-tp2": (2, MEGATRON, {"tp_size": 2}),
    "megatron-pp2": (2, MEGATRON, {"pp_size": 2}),
}
CHOSEN = {
    "torch": list(SETTINGS),
    "torch-cp2-ep2": ["plain", "grads-bf16", "moments-fp8"],
    "megatron-dp2": ["theirs", *SETTINGS],
    "megatron-tp2": ["theirs", "plain", "offload", "grads-bf16"],
    "megatron-pp2": ["theirs", "plain", "grads-bf16"],
}
# Three steps at a rate of 3e-3 with four micro-batches each: the largest relative difference of a loss or
# norm from fp32 states, in terms of what weights in bf16 instead of fp32 change in the same three steps
DISTANCE = {"moments-bf16": 2, "moments-fp8": 10, "grads-bf16": 2}
LONG = ("plain", *DISTANCE)
# of twenty steps' losses, which fall from 4.3 to 3.8: three times what was seen
LONG_DISTANCE = {"moments-bf16": 2.5e-3, "moments-fp8": 4e-3, "grads-bf16": 4.5e-3}


def worker(rank: int, world_size: int, folder: str) -> None:
    """Run the cases of a world size."""

    cuda_shim.install()
    is_for = MegatronUpdate.is_for
    for layout, (size, engine, sizes) in LAYOUTS.items():
        for setting in CHOSEN[layout] if size == world_size else []:
            if setting == "theirs":
                MegatronUpdate.is_for = staticmethod(lambda *_: False)  # type: ignore[method-assign]
            precisions = [Precision.bf16]
            if setting in ("theirs", "plain", "offload"):
                precisions.append(Precision.fp32)
            for precision in precisions:
                optim = SETTINGS.get(setting, {})
                steps = 20 if layout == "torch" and precision is Precision.bf16 and setting in LONG else 3
                rows = train(build(engine, parallel=sizes, precision=precision, optim=optim), steps=steps)
                if rank == 0:
                    torch.save(rows, f"{folder}/{layout}.{setting}.{precision.value}")
                leave_groups()
            MegatronUpdate.is_for = staticmethod(is_for)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer_memory")
    for world_size in (1, 2):
        run_ranks(world_size, worker, str(folder))
    return folder


def numbers(folder: Path, layout: str, setting: str, precision: str = "bf16") -> list[float]:
    """Losses and norms of three steps."""
    rows = torch.load(folder / f"{layout}.{setting}.{precision}", weights_only=False)[:3]
    return [row[key] for row in rows for key in ("lm_loss", "kl_loss", "grad_norm") if key in row]


def worst_difference(got: list[float], want: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["megatron-dp2", "megatron-tp2", "megatron-pp2"])
def test_the_tiled_update_is_megatrons(layout: str, precision: str, folder: Path) -> None:
    assert numbers(folder, layout, "plain", precision) == numbers(folder, layout, "theirs", precision)


@pytest.mark.parametrize(
    ("layout", "setting", "precision"),
    [
        (layout, setting, precision)
        for layout, settings in CHOSEN.items()
        for setting in settings
        for precision in (("fp32", "bf16") if setting == "offload" else ("bf16",))
        if "offload" in setting
    ],
)
def test_states_on_the_host_change_no_bit(layout: str, setting: str, precision: str, folder: Path) -> None:
    without = setting.removesuffix("offload").rstrip("-") or "plain"
    assert numbers(folder, layout, setting, precision) == numbers(folder, layout, without, precision)


@pytest.mark.parametrize(
    ("layout", "setting"),
    [(layout, setting) for layout, settings in CHOSEN.items() for setting in settings if setting in DISTANCE],
)
def test_fewer_bits_change_losses_a_little(layout: str, setting: str, folder: Path) -> None:
    want = numbers(folder, layout, "plain")
    of_weights = worst_difference(numbers(folder, layout, "plain", "fp32"), want)
    assert 0 < worst_difference(numbers(folder, layout, setting), want) < DISTANCE[setting] * of_weights


@pytest.mark.parametrize("setting", LONG_DISTANCE)
def test_fewer_bits_keep_the_loss_of_twenty_steps(setting: str, folder: Path) -> None:
    got, want = (torch.load(folder / f"torch.{one}.bf16", weights_only=False) for one in (setting, "plain"))
    losses = [[row["lm_loss"] for row in rows[:-1]] for rows in (got, want)]
    assert len(losses[0]) == 20
    assert losses[1][-1] < 0.95 * losses[1][0], "it learns"
    worst = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    assert 0 < worst < LONG_DISTANCE[setting]


LOW = {"moments_dtype": MomentsDtype.fp8, "grads_dtype": GradsDtype.bf16, "offload": 0.5}
RESUMED = [
    Layout(engine=TORCH, world_size=1, precision=Precision.bf16, optim=LOW),
    Layout(engine=TORCH, world_size=1, optim={"moments_dtype": MomentsDtype.bf16}),
    Layout(engine=MEGATRON, world_size=2, precision=Precision.bf16, optim=LOW),
    Layout(engine=MEGATRON, world_size=2, optim={"moments_dtype": MomentsDtype.bf16, "offload": 1.0}),
]
WIDE = Layout(engine=TORCH, world_size=1, precision=Precision.bf16)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resumed")
    write_corpus(folder / "corpus")
    first = [Case(layout=one) for one in (*RESUMED, WIDE)]
    then = [Case(layout=one, source=one.name) for one in RESUMED]
    # from few bits on one engine to many on the other, and back
    then += [Case(layout=WIDE, source=RESUMED[2].name), Case(layout=RESUMED[2], source=WIDE.name)]
    phases = [[(case, tuple(range(case.layout.world_size))) for case in cases] for cases in (first, then)]
    run_ranks(2, run_cases, phases, str(folder))
    names = [case.name for case in (*first, *then)]
    return {name: torch.load(folder / name / "result", weights_only=False)["rows"] for name in names}


@pytest.mark.parametrize("layout", RESUMED, ids=lambda layout: layout.name)
def test_goes_on_bit_for_bit(layout: Layout, resumed: dict[str, list[dict[str, Any]]]) -> None:
    got, want = resumed[f"{layout.name}_to_{layout.name}"], resumed[layout.name][SAVED_STEP:]
    for name in ("lm_loss", "kl_loss", "grad_norm"):
        assert [row[name] for row in got] == [row[name] for row in want]


@pytest.mark.parametrize(("source", "target"), [(RESUMED[2], WIDE), (WIDE, RESUMED[2])])
def test_other_settings_take_the_states_over(
    source: Layout, target: Layout, resumed: dict[str, list[dict[str, Any]]]
) -> None:
    got, want = resumed[f"{source.name}_to_{target.name}"], resumed[WIDE.name][SAVED_STEP:]
    # lost moments would show at once: the next update would be as large as the first of all
    for a, b in zip(got, want, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-2)
