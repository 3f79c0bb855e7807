"""A training step on the device: exact in fp64, as exact in fp32 as torch's, and the same bits twice."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.device_jobs import HAS_GPU, Job, needs_device

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core import parallel_state

from msa_train.config import AttentionKernel, Precision, RunConfig
from tests.distributed import test_exactness as exactness
from tests.distributed import test_triton_step as fp32_step
from tests.helpers.exactness_cases import DENSE
from tests.helpers.model_runs import run_steps, small_config, step_packs
from tests.helpers.packs import make_pack

pytestmark = pytest.mark.gpu
# Settings by a case of the exactness test, whose name says what it must equal: block selection, also with a
# KL loss at another temperature, and full attention.
KINDS: dict[str, dict[str, Any]] = {
    "cp1-all_gather-ep1": {},
    "cp2-selected-soft": {"temperature": 1.5},
    "cp2-selected-warm": {"stage": DENSE, "temperature": 1.5},
}
# What computes the operators in fp32 and bf16.
KERNEL = AttentionKernel.triton if HAS_GPU else AttentionKernel.cpu
STEP_LEN, STEP_BLOCK, STEP_VOCAB = (4096, 64, 61) if HAS_GPU else (256, 16, 61)


def fp64_steps(rank: int, world_size: int, kernel: AttentionKernel) -> dict[str, dict[str, Any]]:
    """Two steps of each kind."""
    found = {}
    for kind, settings in KINDS.items():
        found[kind] = run_steps(small_config(kernel=kernel, **settings))
        parallel_state.destroy_model_parallel()
    return found


def fp32_steps(rank: int, world_size: int, stage: str, kernels: dict[str, AttentionKernel]) -> dict[str, Any]:
    """One step in fp32 of each kernel, and how exact it is: in fp64 by the definitions on the same device."""
    pack = [step_packs()[1][:1]]
    settings = fp32_step.STAGES[stage]
    config = small_config(kernel=AttentionKernel.reference, **settings)
    exact = run_steps(config, pack)["steps"][0]
    found: dict[str, Any] = {"layers": set(exact["kl"])}
    for name, kernel in kernels.items():
        parallel_state.destroy_model_parallel()
        step = run_steps(small_config(precision=Precision.fp32, kernel=kernel, **settings), pack)
        found[name] = fp32_step.errors(step["steps"][0], exact)
    parallel_state.destroy_model_parallel()
    return found


def larger_config() -> RunConfig:
    """bf16, tiles that Triton has, and few words, so that many tokens add to one row of the embedding."""
    config = small_config(precision=Precision.bf16, topk=4, kernel=KERNEL)
    model = replace(config.model, hidden_size=96, head_dim=32, rotary_dim=16, init_std=0.05)
    attention = replace(
        config.attention, block_size=STEP_BLOCK, index_head_dim=32, window=3 * STEP_BLOCK // 2
    )
    data = replace(config.data, seq_len=STEP_LEN)
    return replace(config, model=model, attention=attention, data=data)


def step_twice(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Two steps of two packs, from the same weights, twice; and where they were computed."""
    parts = [[STEP_LEN], [STEP_LEN // 2 - 5, STEP_LEN // 4, STEP_BLOCK + 3]]
    packs = [
        make_pack(lengths, seq_len=STEP_LEN, block_size=STEP_BLOCK, vocab_size=STEP_VOCAB, seed=seed)
        for seed, lengths in enumerate(parts)
    ]
    found = []
    for _ in range(2):
        found.append(run_steps(larger_config(), [packs, packs[::-1]]))
        parallel_state.destroy_model_parallel()
    return found


WANTED = Job(fp64_steps, AttentionKernel.reference, device="cpu")
GOT = Job(fp64_steps, AttentionKernel.auto)
FP32 = {
    stage: Job(fp32_steps, stage, {"torch": AttentionKernel.cpu, "ours": KERNEL})
    for stage in fp32_step.STAGES
}
TWICE = Job(step_twice)


@needs_device
@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_fp64_equal_the_cpu(kind: str) -> None:
    want, got = WANTED.result()[kind], GOT.result()[kind]
    assert (want["device"], got["device"]) == ("cpu", "cuda")
    exactness.test_equals_one_process(kind, {kind: [got], exactness.reference_of(kind): [want]})


@needs_device
@pytest.mark.parametrize("stage", FP32)
def test_step_in_fp32(stage: str) -> None:
    """By Triton on a GPU."""
    found = FP32[stage].result()
    assert found["layers"] == {2, 4}
    bound = min(fp32_step.TOLERANCE, 2 * max(found["torch"].values()))
    assert {name: error for name, error in found["ours"].items() if not error <= bound} == {}, bound


@needs_device
def test_steps_give_the_same_bits_twice() -> None:
    first, again = TWICE.result()
    assert first["device"] == "cuda"
    for step, (ours, theirs) in enumerate(zip(first["steps"], again["steps"], strict=True)):
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for name, gradient in ours["gradients"].items():
            assert torch.equal(gradient, theirs["gradients"][name]), (step, name)
            assert gradient.abs().max() > 0 or "expert" in name, (step, name)
        for key, block_indices in ours["selections"].items():
            assert torch.equal(block_indices, theirs["selections"][key]), (step, key)
        assert (ours["loss"], ours["kl"], ours["grad_norm"]) == (
            theirs["loss"],
            theirs["kl"],
            theirs["grad_norm"],
        )
        assert all(map(torch.equal, ours["expert_bias"], theirs["expert_bias"]))
