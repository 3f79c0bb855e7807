"""Rules of selection, shares of remote blocks and the locality loss of the extension benchmark."""

import math

import numpy as np
import pytest
import torch
from msa_kernels import select_blocks

from benchmarks.extension.locality import remote_share
from benchmarks.extension.locality_loss import CP_SIZE, mutual_information
from benchmarks.extension.report import figures, worst_depth
from benchmarks.extension.selection_rules import Geometry, Rule, as_mask, select
from benchmarks.extension.shares import share
from msa_train.simulate.selections.recorded import RecordedSelections

GEOMETRY = Geometry(torch.tensor([0, 96, 256]), block_size=8, topk=4, local_blocks=2)


def _index(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, 2, 16, generator=generator), torch.randn(256, 16, generator=generator)


def _own(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return select_blocks(q, k, GEOMETRY.cu_seqlens, block_size=8, topk=4, local_blocks=2)


def test_without_bonus_the_selection_is_the_model_s() -> None:
    q, k = _index()
    chosen = as_mask(select(Rule(cp_size=8), q, k, GEOMETRY), 32)
    assert torch.equal(chosen, as_mask(_own(q, k), 32))


def test_a_bonus_fetches_less_and_keeps_what_must_be_seen() -> None:
    q, k = _index()
    fetched: list[float] = []
    for bonus in (0.0, 1.0, 100.0):
        chosen = select(Rule(bonus=bonus, cp_size=4), q, k, GEOMETRY)
        fetched.append(float(remote_share(chosen, 32, 4).mean()))
        mask, own = as_mask(chosen, 32), torch.arange(256) // 8
        assert mask[torch.arange(256), :, own].all(), "the query's own block"
        assert not mask[96:, :, :12].any(), "another document"
        assert not (mask & (torch.arange(32) > own[:, None])[:, None]).any(), "the future"
    assert fetched[0] > fetched[1] > fetched[2]


def test_neighbours_share_what_lies_before_them() -> None:
    q, k = _index()
    mask = as_mask(select(Rule(neighbours=32), q, k, GEOMETRY), 32)
    for start in range(128, 256, 32):
        before = mask[start : start + 32, :, : start // 8]
        assert torch.equal(before, before[:1].expand_as(before))
        assert before[0].sum(-1).tolist() == [4, 4]
        own = torch.arange(start, start + 32) // 8
        assert torch.equal(mask[start : start + 32, 0].sum(-1), 4 + own - start // 8 + 1)


def test_shares_of_remote_blocks() -> None:
    blocks = torch.tensor([[[0, -1]], [[1, -1]], [[0, 2]], [[3, -1]]])
    assert remote_share(blocks, 4, 2).tolist() == [0.25]
    recorded = RecordedSelections(
        layer=1,
        seq_len=8,
        block_size=2,
        num_kv_heads=1,
        topk=2,
        chunk_tokens=2,
        cu_seqlens=[0, 8],
        bits=np.array([[[128]], [[192]], [[96]], [[144]]], np.uint8),
        sample_position=np.zeros(0, np.int64),
        sample_blocks=np.zeros((0, 1, 2), np.int32),
        source="test",
    )
    assert share(recorded, 2) == pytest.approx((0 + 1) / 2)


def test_locality_loss_is_the_information_of_queries_about_blocks() -> None:
    num_tokens, block = 16 * CP_SIZE, 8
    k = torch.zeros(num_tokens, 2)
    # blocks that each query wants with certainty: all the first one, or by turns the first two
    k[:block, 0], k[block : 2 * block, 1] = 1.0, 1.0
    alike = torch.zeros(num_tokens, 1, 2)
    alike[..., 0] = 200.0
    assert float(mutual_information(alike, k, block)) == pytest.approx(0, abs=1e-6)
    by_turns = alike.clone()
    by_turns[1::2] = torch.tensor([0.0, 200.0])
    by_turns.requires_grad_()
    loss = mutual_information(by_turns, k, block)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-3)
    (gradient,) = torch.autograd.grad(mutual_information(by_turns * 0.01, k, block), by_turns)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_figures_of_an_evaluation() -> None:
    rows = [
        {"kind": "task", "task": "vt", "length": 2048, "hit_rate": None, "nll_per_token": 1.5, "samples": 4},
        {
            "kind": "position_loss",
            "length": 10240,
            "loss_by_log2": {"0": [1, 4.0], "10": [3, 2.0], "11": [4, 1.0]},
        },
    ]
    found = figures(rows)
    assert found["tasks"]["vt@2048"]["nll_per_token"] == 1.5
    assert found["short_loss"] == pytest.approx(2.5), "positions 1 and 1,024 to 2,047"
    assert found["loss"] == pytest.approx(14 / 8)
    assert worst_depth({"by_depth": {"0.00": [9, 10], "1.00": [10, 10]}}) == 0.9
