"""Recall and f of the learning benchmark, against sums done by hand or by loops."""

import math

import pytest
import torch

from benchmarks.learning.measure import block_mass, remote_share


def test_remote_share_of_an_example() -> None:
    blocks = torch.tensor([[0, -1], [1, -1], [0, 2], [3, -1]], dtype=torch.int32)[:, None]
    assert remote_share(blocks, 4, 1, 2) == [0.25]
    # Four ranks have three remote blocks each; the third needs one of them.
    assert remote_share(blocks, 4, 1, 4) == pytest.approx([1 / 12])


def test_remote_share_counts_groups_apart_and_each_block_once() -> None:
    # 8 tokens in blocks of 2. Group 0: all tokens of the second half take block 0; group 1: own blocks only.
    own = torch.arange(8) // 2
    first = torch.where(own >= 2, 0, -1)
    blocks = torch.stack((torch.stack((first, own), 1), torch.stack((own, torch.full((8,), -1)), 1)), 1)
    assert remote_share(blocks.int(), 4, 2, 2) == [0.25, 0.0]


def test_remote_share_when_everything_before_is_selected() -> None:
    blocks = torch.arange(16).expand(16, 16).clone()
    blocks[blocks > torch.arange(16)[:, None]] = -1
    # Rank r of P needs r of the other P - 1 shards: one half on average.
    for cp_size in (2, 4, 8, 16):
        assert remote_share(blocks[:, None].int(), 16, 1, cp_size) == pytest.approx([0.5])


def test_block_mass_is_the_mean_softmax_of_the_groups_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 2, 2, 4, generator=generator), torch.randn(12, 2, 4, generator=generator)
    position = torch.tensor([0, 5, 11])
    mass = block_mass(q, k, position, 4)
    assert mass.shape == (3, 2, 3)
    for i, at in enumerate(position.tolist()):
        for group in range(2):
            expected = [0.0] * 3
            for head in range(2):
                weight = [math.exp(float(q[i, group, head] @ k[j, group]) / 2) for j in range(at + 1)]
                for j, w in enumerate(weight):
                    expected[j // 4] += w / sum(weight) / 2
            assert mass[i, group].tolist() == pytest.approx(expected, abs=1e-6)
