"""What runs on GPUs only, on the CPU in their place: tensors of a device, NCCL's collectives, stock Megatron.

Each is compared with the same on the CPU, so that a branch for GPUs that computes something else shows.
"""

import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import megatron.core
import msa_kernels
import pytest
import torch
import torch.distributed as dist

import msa_train
from msa_train.config import CpLayout, EngineKind, KvExchange, Recompute
from tests.distributed import test_exactness as exactness
from tests.distributed import test_resume_matrix as matrix
from tests.helpers.exactness_cases import DENSE
from tests.helpers.model_runs import run_steps, small_config
from tests.helpers.pretended_gpu.build import load_device, needs_pretended_gpu
from tests.helpers.resume_runs import SAVED_STEP, Case, Layout, run_cases
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import ROOT, TINY, write_corpus

pytestmark = needs_pretended_gpu
# every exchange, layout, stage and way of cutting once
CASES = (
    "cp2-selected-ep2",
    "cp2-all_gather-ep2",
    "cp2-ring-recompute",
    "cp2-selected-warm",
    "cp2-auto-recompute-warm",
    "cp3-selected-heads3",
    "cp3-selected-soft",
    "cp4-hot-again-recompute",
    "cp4-selected-ep4",
    "cp2-selected-ep2-tiles-recompute",
)


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """What the device says to mistakes that a CPU would not notice, and that it is late where a GPU is."""
    device, host = torch.arange(6.0, device="cuda"), torch.arange(6.0)
    mistakes: dict[str, Any] = {
        "host beside device": lambda: device + host,
        "host in place": lambda: device.mul_(host),
        "numpy": lambda: device.numpy(),
        "host to NCCL": lambda: dist.all_reduce(host),
        "gaps to NCCL": lambda: dist.all_reduce(device.view(2, 3).t()),
        "other device": lambda: device + device.to("cuda:1"),
    }
    said = {}
    for name, call in mistakes.items():
        try:
            call()
        except (RuntimeError, TypeError, ValueError) as error:
            said[name] = str(error)
    assert torch.empty(3, device="cuda").isnan().all(), "fresh memory must not look like a result"
    work = dist.all_reduce(device, async_op=True)
    assert device.isnan().all(), "a result that nobody waited for"
    work.wait()
    work = dist.all_gather_into_tensor(torch.empty_like(device), device, async_op=True)
    device += 1
    try:
        work.wait()
    except RuntimeError as error:
        said["changed under way"] = str(error)
    device -= 1
    late = torch.empty(6, pin_memory=True).copy_(device, non_blocking=True)
    assert late.isnan().all(), "a copy that nobody waited for"
    torch.cuda.current_stream().synchronize()
    assert torch.equal(late, host)
    assert torch.equal((device + 1).cpu(), host + 1)
    assert device[torch.tensor([1, 2])].tolist() == [1.0, 2.0], "an index may come from the host"
    return said


def test_device_shows_what_a_gpu_would() -> None:
    (said,) = run_ranks(1, refusals, device="pretended")
    assert "all tensors to be on the same device" in said["host beside device"]
    assert "all tensors to be on the same device" in said["host in place"]
    assert "can't convert cuda" in said["numpy"]
    assert "No backend type associated with device type cpu" in said["host to NCCL"]
    assert "contiguous" in said["gaps to NCCL"]
    assert "cuda:1" in said["other device"]
    assert "changed while a collective that reads it was under way" in said["changed under way"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The cases on GPUs, and what they must equal on the CPU."""
    folder = tmp_path_factory.mktemp("pretended")
    references = {exactness.reference_of(name) for name in CASES}
    found = exactness.run_cases(sorted(references), folder, "cpu")
    return found | exactness.run_cases(CASES, folder, "pretended")


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_cpu(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    assert {rank["device"] for rank in results[name]} == {"cuda"}
    exactness.test_equals_one_process(name, results)


# Where the host waits for a GPU in a training step, and why; otherwise it is to run ahead.
WAITS = {
    "model/layers/moe/routing.py:counts_on_host": "the tokens of each expert decide how much is sent",
    "parallel/kv_exchange/requests.py:_introduce": "once for each shape",
    "parallel/attention/selection_recall.py:_tiles": "on steps that look at the attention",
    "training/optim/grad_buffers.py:norm": "the norm of the gradients, once a step",
    "training/engines/torch_engine.py:train_step": "the loss, once a step",
}


def places_of_waits(rank: int, world_size: int, arguments: dict[str, Any]) -> set[str]:
    """FILE:FUNCTION of our package of every wait in `train_step`."""
    ours, *others = [f"{package.__path__[0]}{os.sep}" for package in (msa_train, msa_kernels, megatron.core)]
    found: set[str] = set()

    def note(_operation: str) -> None:
        frames = traceback.extract_stack()
        # the backward pass has a thread of its own
        in_step = threading.current_thread() is not threading.main_thread()
        in_step |= any(frame.name == "train_step" for frame in frames)
        inner = [frame for frame in frames if frame.filename.startswith((ours, *others))]
        if in_step and inner and inner[-1].filename.startswith(ours):
            found.add(f"{Path(inner[-1].filename).relative_to(ours).as_posix()}:{inner[-1].name}")

    load_device().tell_waits(note)
    run_steps(small_config(**arguments))
    load_device().tell_waits(None)
    return found


def test_host_waits_for_a_gpu_where_it_must() -> None:
    seen: set[str] = set()
    for arguments in (
        {"cp_size": 2, "ep_size": 2, "recompute": Recompute.full},
        {"cp_size": 2, "exchange": KvExchange.ring, "layout": CpLayout.zigzag, "stage": DENSE},
    ):
        for places in run_ranks(2, places_of_waits, arguments, device="pretended"):
            seen |= places
    assert seen == set(WAITS)


def layout(engine: EngineKind, **sizes: int) -> Layout:
    return Layout(engine=engine, world_size=2, sizes={f"{name}_size": size for name, size in sizes.items()})


ALONE = Layout(engine=EngineKind.torch, world_size=1)
# context and expert parallel, tensor parallel, pipeline parallel, data parallel
ON_GPUS = [
    layout(EngineKind.megatron, cp=2, ep=2),
    layout(EngineKind.megatron, tp=2),
    layout(EngineKind.megatron, pp=2),
    layout(EngineKind.megatron, ep=2),
    layout(EngineKind.torch, cp=2, ep=2),
]
BEGUN_ON_GPUS = [ON_GPUS[1], ON_GPUS[3]]
BACK = layout(EngineKind.torch, ep=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process on the CPU, taken over by GPUs at its checkpoint; and the other way round."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    both = (0, 1)
    start = [(Case(layout=ALONE), (0,))]
    there = [(Case(layout=one, source=ALONE.name), both) for one in ON_GPUS]
    begun = [(Case(layout=one, done=False), both) for one in BEGUN_ON_GPUS]
    back = [(Case(layout=BACK, source=case.name), both) for case, _ in begun]
    for phase, device in ((start, "cpu"), (there + begun, "pretended"), (back, "cpu")):
        run_ranks(2, run_cases, [phase], str(folder), device=device)
    names = [case.name for case, _ in start + there + begun + back]
    return {name: torch.load(folder / name / "result", weights_only=False) for name in names}


@pytest.mark.parametrize("name", [one.name for one in ON_GPUS])
def test_gpus_go_on_from_a_checkpoint_of_the_cpu(name: str, runs: dict[str, Any]) -> None:
    got, want = runs[f"{ALONE.name}_to_{name}"], runs[ALONE.name]
    matrix.compare(got["rows"], want["rows"][SAVED_STEP:], matrix.TOLERANCE[ALONE.precision])
    assert got["samples"] == want["samples"][SAVED_STEP:]


@pytest.mark.parametrize("name", [one.name for one in BEGUN_ON_GPUS])
def test_cpu_goes_on_from_a_checkpoint_of_gpus(name: str, runs: dict[str, Any]) -> None:
    want = runs[ALONE.name]["rows"]
    matrix.compare(runs[name]["rows"], want[:SAVED_STEP], matrix.TOLERANCE[ALONE.precision])
    got = runs[f"{name}_to_{BACK.name}"]["rows"]
    matrix.compare(got, want[SAVED_STEP:], matrix.TOLERANCE[ALONE.precision])


def test_every_process_of_a_command_has_one(tmp_path: Path) -> None:
    """The launcher finds a GPU and its worker trains there, with stock Megatron in bf16."""
    write_corpus(tmp_path / "corpus")
    settings = {
        "engine": "megatron",
        "train.precision": "bf16",
        "train.steps": 2,
        "parallel.cp_size": 1,
        "parallel.ep_size": 1,
        "run_dir": tmp_path / "run",
        "data.corpus": tmp_path / "corpus",
        "data.cache_dir": tmp_path / "cache",
    }
    command = ["-m", "launchers.train", *TINY, *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.pretended_gpu.run", sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 processes on GPUs" in done.stdout
    assert "1 x cuda on" in done.stdout
    assert "step 2/2" in done.stdout
