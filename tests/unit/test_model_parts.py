"""Pieces of the model that need no process group: rotary embedding, norm."""

from types import SimpleNamespace

import pytest
import torch

from msa_train.config import Rope
from msa_train.model.inputs.pack_params import tensor_parallel_padding
from msa_train.model.layers.norm import RMSNorm
from msa_train.model.layers.rotary import apply_rotary, rotary_table
from tests.helpers.compare import assert_rows_close


def test_rotary_equals_complex_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 10, generator=generator, dtype=torch.float64)
    position = torch.tensor([0, 1, 2, 0, 1, 900_000, 1_000_003])
    table = rotary_table(position, rotary_dim=6, rope=Rope(theta=5e6), dtype=torch.float64)
    got = apply_rotary(x, table)
    frequency = 5e6 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.exp(1j * position[:, None, None] * frequency)
    turned = torch.complex(x[..., :3], x[..., 3:6]) * turn
    assert_rows_close(got[..., :6], torch.cat((turned.real, turned.imag), -1), 1e-12)
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_rotary_angles_are_exact_at_a_million() -> None:
    """An fp32 product of position and frequency would be off by hundredths of a radian."""
    position = torch.tensor([999_983])
    cos, _ = rotary_table(position, rotary_dim=4, rope=Rope(theta=3.0), dtype=torch.float32)
    exact = torch.cos(torch.tensor(999_983 * 3.0**-0.5, dtype=torch.float64))
    assert abs(float(cos[0, 1]) - float(exact)) < 1e-6


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm(zero_centered: bool) -> None:
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=torch.bfloat16,
        sequence_parallel=False,
    )
    norm = RMSNorm(config, 8, eps=1e-6)  # type: ignore[arg-type]
    norm.weight.data.fill_(0.5)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = want * (1.5 if zero_centered else 0.5)
    assert norm(x).dtype == torch.bfloat16
    assert_rows_close(norm(x).float(), want, 2**-8)


def test_padding_of_tensor_parallel_ranks() -> None:
    valid = torch.tensor([True, True, False, True])
    assert tensor_parallel_padding(valid, 0, 1).tolist() == [[False, False, True, False]]
    assert tensor_parallel_padding(valid, 1, 2).tolist() == [[True, False]]
