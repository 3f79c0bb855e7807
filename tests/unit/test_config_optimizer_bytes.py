"""Bytes of weights, gradients and optimizer states per parameter, against the tensors of known optimizers."""

import pytest

from msa_train.config import GradsDtype, MomentsDtype, OptimConfig, Precision
from msa_train.config.optimizer_bytes import optimizer_bytes

GIB = 2**30


def test_the_default_is_eighteen_bytes() -> None:
    got = optimizer_bytes(OptimConfig(), Precision.bf16)
    assert (got.weight, got.gradient, got.state, got.host_state) == (2, 4, 12, 0)
    assert got.unsharded + got.state == 18
    assert optimizer_bytes(OptimConfig(), Precision.fp32).state == 8
    assert optimizer_bytes(OptimConfig(), Precision.fp64).unsharded == 16


@pytest.mark.parametrize(
    ("moments", "state"),
    [(MomentsDtype.fp32, 12.0), (MomentsDtype.bf16, 8.0), (MomentsDtype.fp8, 6.03125)],
)
def test_moments(moments: MomentsDtype, state: float) -> None:
    for share in (0.0, 0.25, 1.0):
        got = optimizer_bytes(
            OptimConfig(moments_dtype=moments, grads_dtype=GradsDtype.bf16, offload=share), Precision.bf16
        )
        assert got.unsharded == 4
        assert got.state == pytest.approx(state * (1 - share))
        assert got.host_state == pytest.approx(state * share)
        assert got.step_temporary < GIB
