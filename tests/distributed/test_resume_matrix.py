"""Saved in one layout and engine, resumed in another: the same losses on the same samples for ten steps.

CI runs every layout as a source and as a target, in a chain of pairs. Three targets for every source, and
layouts of eight processes: MATRIX=all pytest tests/distributed/test_resume_matrix.py
"""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.config import EngineKind, Precision
from tests.helpers.resume_runs import BATCH, MORE_STEPS, SAVED_STEP, Case, Layout, run_cases
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

ALL = os.environ.get("MATRIX") == "all"
PROCESSES, TIMEOUT_S = (8, 7200) if ALL else (4, 600)
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)
# fp32: twelve steps of AdamW on sums in another order, see test_megatron_engine.py
TOLERANCE = {Precision.fp32: 1e-5, Precision.fp64: 1e-10}
NAMES = ("lm_loss", "kl_loss", "grad_norm")


def layouts() -> list[Layout]:
    """All sizes that the engines allow and the processes suffice for."""
    found = []
    for engine in (EngineKind.torch, EngineKind.megatron):
        model = (1, 2) if engine is EngineKind.megatron else (1,)
        for cp, ep, dp, tp, pp in product((1, 2, 4), (1, 2), (1, 2), model, model):
            world_size = cp * dp * tp * pp
            if world_size > PROCESSES or (world_size // pp) % ep:
                continue
            sizes = {"cp_size": cp, "ep_size": ep, "tp_size": tp, "pp_size": pp}
            given = {name: size for name, size in sizes.items() if size > 1}
            found.append(Layout(engine=engine, world_size=world_size, sizes=given))
    return found


def deepspeed_layouts() -> list[Layout]:
    """All stages of ZeRO with all sizes; with stage 3 every rank holds every expert."""
    sizes = [one for one in layouts() if one.engine is EngineKind.torch]
    return [
        Layout(engine=EngineKind.deepspeed, world_size=one.world_size, sizes=one.sizes, zero_stage=stage)
        for one in sizes
        for stage in range(4)
        if stage < 3 or "ep_size" not in one.sizes
    ]


def few_deepspeed_layouts() -> list[Layout]:
    """Each stage, beside data, context and expert parallelism."""
    chosen = {"z0-cp2", "z1-ep2-dp2", "z1-cp4", "z2-cp2-ep2-dp2", "z3", "z3-cp2-dp2"}
    return [one for one in deepspeed_layouts() if one.name.removeprefix("deepspeed-") in chosen]


def fp64_layouts() -> list[Layout]:
    """Only engine=torch computes in fp64."""
    return [
        Layout(engine=one.engine, world_size=one.world_size, sizes=one.sizes, precision=Precision.fp64)
        for one in layouts()
        if one.engine is EngineKind.torch
    ]


def chain(some: list[Layout], shift: int = 0) -> list[tuple[Layout, Layout]]:
    """Each layout once as a source and once as a target, far apart in the list: engines and sizes mix."""
    shift = shift or len(some) // 2 + 1
    return [(layout, some[(number + shift) % len(some)]) for number, layout in enumerate(some)]


def pairs() -> list[tuple[Layout, Layout]]:
    """Sources with their targets."""
    if ALL:
        every = [*layouts(), *deepspeed_layouts()]
        far = len(every) // 2
        chains = [chain(every, shift) for shift in (far // 2, far + 1, far + far // 2)]
        fp64 = product(fp64_layouts(), repeat=2)
        found = [*fp64, *unchanged(), *(pair for some in chains for pair in some)]
        return list({(source.name, target.name): (source, target) for source, target in found}.values())
    few = [one for one in layouts() if one.world_size < PROCESSES or one.engine is EngineKind.torch]
    largest = [one for one in layouts() if one not in few]
    return [
        *chain([*few, *few_deepspeed_layouts(), *largest[::3]]),
        *chain(fp64_layouts()[::2]),
        *unchanged(),
    ]


def unchanged() -> list[tuple[Layout, Layout]]:
    """Pairs that must go on bit for bit."""
    alike = ("torch", "megatron", "torch-cp2-ep2", "deepspeed-z3-dp2")
    return [(one, one) for one in [*layouts(), *deepspeed_layouts()] if one.name in alike]


def first_of(precision: Precision) -> Layout:
    """The one process that all are compared with."""
    return Layout(engine=EngineKind.torch, world_size=1, precision=precision)


def all_cases() -> list[list[Case]]:
    """Runs that save, and runs that go on from them."""
    chosen = pairs()
    whole = [*(one for one, _ in unchanged()), *(first_of(precision) for precision in TOLERANCE)]
    sources = [*whole, *(source for source, _ in chosen)]
    by_name = {source.name: Case(layout=source, done=source in whole) for source in sources}
    targets = {
        (source.name, target.name): Case(layout=target, source=source.name) for source, target in chosen
    }
    return [list(by_name.values()), list(targets.values())]


def dealt(cases: list[Case]) -> list[tuple[Case, tuple[int, ...]]]:
    """Cases with the processes that run them: those that are in use least."""
    load, result = [0.0] * PROCESSES, []
    for case in sorted(cases, key=lambda case: -case.layout.world_size):
        size = case.layout.world_size
        places = [range(begin, begin + size) for begin in range(0, PROCESSES, size)]
        members = min(places, key=lambda place: max(load[rank] for rank in place))
        for rank in members:
            load[rank] = max(load[rank] for rank in members) + 1.0
        result.append((case, tuple(members)))
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("matrix")
    write_corpus(folder / "corpus")
    phases = [dealt(cases) for cases in all_cases()]
    run_ranks(PROCESSES, run_cases, phases, str(folder), timeout_s=TIMEOUT_S)
    names = [case.name for phase in phases for case, _ in phase]
    return {name: torch.load(Path(folder) / name / "result", weights_only=False) for name in names}


@pytest.mark.parametrize(("source", "target"), pairs(), ids=lambda layout: layout.name)
def test_another_layout_goes_on_alike(source: Layout, target: Layout, results: dict[str, Any]) -> None:
    got, want = results[f"{source.name}_to_{target.name}"], results[first_of(source.precision).name]
    saved = results[source.name]
    compare(saved["rows"][:SAVED_STEP], want["rows"][:SAVED_STEP], TOLERANCE[source.precision])
    assert [row["step"] for row in got["rows"]] == list(range(SAVED_STEP + 1, SAVED_STEP + MORE_STEPS + 1))
    compare(got["rows"], want["rows"][SAVED_STEP:], TOLERANCE[source.precision])
    assert got["samples"] == got["wanted"] == want["samples"][SAVED_STEP:]
    seen = [sample for step in [*saved["samples"][:SAVED_STEP], *got["samples"]] for sample in step]
    assert len(set(seen)) == len(seen) == (SAVED_STEP + MORE_STEPS) * BATCH


@pytest.mark.parametrize("layout", [one for one, _ in unchanged()], ids=lambda layout: layout.name)
def test_the_same_layout_goes_on_bit_for_bit(layout: Layout, results: dict[str, Any]) -> None:
    got, want = results[f"{layout.name}_to_{layout.name}"]["rows"], results[layout.name]["rows"][SAVED_STEP:]
    for name in NAMES:
        assert [row[name] for row in got] == [row[name] for row in want]


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]], tolerance: float) -> None:
    """Rows of the same steps, the worst number of each name."""
    for name in NAMES:
        worst = max(abs(a[name] / b[name] - 1.0) for a, b in zip(got, want, strict=True))
        assert worst < tolerance, f"{name}: {worst:.2g}"
