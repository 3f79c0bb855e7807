"""Stages of unequal sizes and interleaved ones: runs go over from one to another, and to one process."""

from typing import Any

import pytest
import torch

from msa_train.config import EngineKind
from tests.distributed import test_resume_matrix as matrix
from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.resume_runs import SAVED_STEP, Case, Layout, run_cases
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

pytestmark = needs_pretended_gpu
LAYERS = 4
ALONE = Layout(engine=EngineKind.torch, world_size=1, num_layers=LAYERS)


def pipeline(pp_layout: str) -> Layout:
    return Layout(
        engine=EngineKind.megatron,
        world_size=2,
        sizes={"pp_size": 2},
        pp_layout=pp_layout,
        num_layers=LAYERS,
    )


UNEVEN, INTERLEAVED = pipeline("1,3"), pipeline("1,1,1,1")
# source and target
PAIRS = [(ALONE, UNEVEN), (ALONE, INTERLEAVED), (INTERLEAVED, UNEVEN), (UNEVEN, INTERLEAVED)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs that begin on one process or two pretended GPUs, and go on where another one has stopped."""
    folder, both = tmp_path_factory.mktemp("runs"), (0, 1)
    write_corpus(folder / "corpus")
    start = [(Case(layout=ALONE), (0,))]
    begun = [(Case(layout=one, done=False), both) for one in (UNEVEN, INTERLEAVED)]
    there = [(Case(layout=target, source=source.name), both) for source, target in PAIRS]
    back = [(Case(layout=ALONE, source=INTERLEAVED.name), (0,))]
    for phases, device in (([start], "cpu"), ([begun, there], "pretended"), ([back], "cpu")):
        run_ranks(2, run_cases, phases, str(folder), device=device)
    names = [case.name for case, _ in start + begun + there + back]
    return {name: torch.load(folder / name / "result", weights_only=False) for name in names}


@pytest.mark.parametrize("layout", [UNEVEN, INTERLEAVED], ids=lambda one: one.name)
def test_same_losses_as_one_process(layout: Layout, runs: dict[str, Any]) -> None:
    want = runs[ALONE.name]["rows"][:SAVED_STEP]
    matrix.compare(runs[layout.name]["rows"], want, matrix.TOLERANCE[ALONE.precision])


@pytest.mark.parametrize(
    "name", [f"{source.name}_to_{target.name}" for source, target in [*PAIRS, (INTERLEAVED, ALONE)]]
)
def test_checkpoint_goes_on_in_another_layout(name: str, runs: dict[str, Any]) -> None:
    want = runs[ALONE.name]
    matrix.compare(runs[name]["rows"], want["rows"][SAVED_STEP:], matrix.TOLERANCE[ALONE.precision])
    assert runs[name]["samples"] == want["samples"][SAVED_STEP:]
