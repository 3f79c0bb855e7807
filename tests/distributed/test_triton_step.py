"""A training step through the Triton kernels, in their interpreter: as exact in fp32 as torch is in fp32.

fp64 with the plain definitions is what both are compared with, on two context-parallel ranks, so that
attention runs over several pools.
"""

import sys
from typing import Any

import pytest
import torch

from msa_train.config import AttentionKernel, Precision, StageAttention, StageConfig
from tests.helpers.compare import worst_row
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import run_steps, small_config, step_packs
from tests.helpers.spawn import run_ranks
from tests.helpers.triton_env import needs_triton

KINDS = {
    "exact": (Precision.fp64, AttentionKernel.reference),
    "torch": (Precision.fp32, AttentionKernel.cpu),
    "triton": (Precision.fp32, AttentionKernel.triton),
}
# Worst row of any gradient, relative to the gradient's largest value: some hundred roundings of 2^-24. The
# sharper bound is twice the worst that the same step has in torch.
TOLERANCE = 2e-5


# The second: the index branch learns under full attention, from a teacher with its own normaliser.
STAGES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"stage": StageConfig(attention=StageAttention.dense), "temperature": 2.0},
}


def worker(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """One step of each stage and kind, on a pack of three documents."""

    found: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for stage, settings in STAGES.items():
        for name, (precision, kernel) in KINDS.items():
            config = small_config(cp_size=world_size, precision=precision, kernel=kernel, **settings)
            found[stage][name] = run_steps(config, [step_packs()[1][:1]])["steps"][0]
            leave_groups()
            # the import is what tells whether the warm-up's kernels ran
            found[stage][name]["dense_kernels"] = "msa_kernels.dense_kl.triton.launch" in sys.modules
    return found


def errors(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Of loss, KL losses and every gradient, relative; selections must be equal."""
    for key, block_indices in want["selections"].items():
        assert torch.equal(got["selections"][key], block_indices), key
    result = {"loss": abs(got["loss"] / want["loss"] - 1)}
    result |= {f"kl{layer}": abs(got["kl"][layer] / kl - 1) for layer, kl in want["kl"].items()}
    gradients = want["gradients"]
    return result | {name: worst_row(got["gradients"][name], gradients[name]) for name in gradients}


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here, this step on the CPU")
def test_step_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for rank in run_ranks(2, worker, timeout_s=300, fresh=True):
        for stage, found in rank.items():
            assert found["exact"]["kl"].keys() == {2, 4}, stage
            assert found["triton"]["dense_kernels"] == (stage == "dense")
            ours = errors(found["triton"], found["exact"])
            theirs = errors(found["torch"], found["exact"])
            worst = max(ours, key=lambda name: ours[name])
            bound = min(TOLERANCE, 2 * max(theirs.values()))
            assert ours[worst] <= bound, (stage, worst, ours[worst], theirs[worst])
