"""Block selection against its definition."""

from typing import Any

import pytest
import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import whole_pack
from msa_kernels.block_sparse_attention.tiled import pool_forward
from msa_kernels.select_blocks import lse as lse_module
from msa_kernels.select_blocks import op as op_module
from msa_kernels.select_blocks.reference import select_blocks_reference
from msa_kernels.select_blocks.types import SelectionArgs


@pytest.mark.parametrize(
    ("block_size", "topk", "local_blocks", "cu_seqlens"),
    [
        (4, 3, 1, [0, 64]),
        (4, 3, 2, [0, 64]),
        (8, 1, 1, [0, 16, 24, 64]),
        (4, 4, 4, [0, 4, 8, 12, 40, 64]),
        (16, 16, 1, [0, 48, 64]),
    ],
    ids=["one_long", "two_local", "only_local", "all_local", "topk_covers_all"],
)
@pytest.mark.parametrize("offset", [0, 27], ids=["whole", "inside_a_block"])
def test_equals_definition(
    block_size: int, topk: int, local_blocks: int, cu_seqlens: list[int], offset: int
) -> None:
    generator = torch.Generator().manual_seed(block_size + topk + offset)
    q = torch.randn(64, 3, 5, generator=generator, dtype=torch.float64)[offset:]
    k = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    valid = torch.rand(q.shape[0], generator=generator) > 0.2
    starts = torch.tensor(cu_seqlens)
    arguments = {
        "block_size": block_size,
        "topk": topk,
        "local_blocks": local_blocks,
        "query_offset": offset,
        "query_valid": valid,
    }
    got = select_blocks(q, k, starts, **arguments)
    assert got.dtype == torch.int32
    assert torch.equal(got, select_blocks_reference(SelectionArgs(q, k, starts, **arguments))[0])
    assert (got[~valid] == -1).all()


def test_ties_go_to_the_lower_block() -> None:
    """All scores equal: the first blocks win, whatever torch.topk would have taken."""
    q, k = torch.ones(64, 2, 4), torch.ones(64, 4)
    got = select_blocks(q, k, torch.tensor([0, 64]), block_size=4, topk=5)
    assert got[63].tolist() == [[0, 1, 2, 3, 15]] * 2
    assert torch.equal(
        got, select_blocks_reference(SelectionArgs(q, k, torch.tensor([0, 64]), block_size=4, topk=5))[0]
    )


def test_groups_select_independently() -> None:
    k = torch.zeros(64, 4)
    k[8, 0] = k[40, 1] = 5.0
    q = torch.zeros(64, 2, 4)
    q[:, 0, 0] = q[:, 1, 1] = 1.0
    got = select_blocks(q, k, torch.tensor([0, 64]), block_size=8, topk=2)
    assert got[63].tolist() == [[1, 7], [5, 7]]


def test_some_queries_select_as_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions far apart, several in a tile, over documents; tiles of a few queries."""
    monkeypatch.setattr(op_module, "_QUERY_TILE", 4)
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(96, 2, 6, generator=generator)
    k = torch.randn(96, 6, generator=generator)
    starts = torch.tensor([0, 40, 96])
    every = select_blocks(q, k, starts, block_size=8, topk=2)
    position = torch.tensor([0, 7, 9, 38, 39, 40, 41, 70, 95])
    for kernel in ("cpu", "reference"):
        some = select_blocks(q[position], k, starts, block_size=8, topk=2, position=position, kernel=kernel)
        assert torch.equal(some, every[position]), kernel


@pytest.mark.parametrize("rows_per_item", [8, 512], ids=["short_items", "long_items"])
@pytest.mark.parametrize("local_blocks", [1, 3])
def test_lse_of_selected_tokens(
    rows_per_item: int, local_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scores in one matrix; padding and documents, and a portion that ends inside of them."""
    monkeypatch.setattr(lse_module, "_MIN_ROWS", rows_per_item)
    monkeypatch.setattr(lse_module, "_PAIRS", 2 * 4 * 20)
    generator = torch.Generator().manual_seed(9)
    q = 2 * torch.randn(70, 2, 6, generator=generator, dtype=torch.float64)
    k = 2 * torch.randn(96, 6, generator=generator, dtype=torch.float64)
    valid = torch.rand(70, generator=generator) > 0.1
    starts = torch.tensor([0, 32, 40, 96])
    arguments: dict[str, Any] = {
        "block_size": 8,
        "topk": 4,
        "local_blocks": local_blocks,
        "query_offset": 26,
        "query_valid": valid,
    }
    blocks, lse = select_blocks(q, k, starts, **arguments, return_lse=True, index_scale=0.7)
    token = torch.arange(96)
    chosen = (blocks[:, :, None] == (token // 8)[:, None]).any(-1)
    chosen &= (token <= torch.arange(26, 96)[:, None])[:, None]
    scores = 0.7 * torch.einsum("tmd,sd->tms", q, k)
    want = scores.masked_fill(~chosen, float("-inf")).logsumexp(-1)
    assert torch.equal(lse == float("-inf"), ~valid[:, None].expand(-1, 2))
    assert float((lse - want)[valid].abs().max()) < 1e-13
    assert torch.equal(blocks, select_blocks(q, k, starts, **arguments))
    again = select_blocks(q, k, starts, **arguments, kernel="reference", return_lse=True, index_scale=0.7)[1]
    assert float((again - want)[valid].abs().max()) < 1e-13


def test_lse_is_that_of_attention() -> None:
    """What the forward pass of attention forms again for the KL loss; fp32 sums for 16-bit inputs."""
    generator = torch.Generator().manual_seed(10)
    q, q_index = torch.randn(2, 64, 2, 8, generator=generator).bfloat16()
    k, v, k_index = torch.randn(3, 64, 2, 8, generator=generator).bfloat16()
    blocks, lse = select_blocks(
        q_index, k_index[:, 0], torch.tensor([0, 64]), block_size=8, topk=3, return_lse=True
    )
    queries, pool, block_table = whole_pack(q, k, v, blocks, 8, 1.0, 0, window=None)
    queries.q_index, queries.k_index = q_index, k_index[:, 0].reshape(8, 8, 8)
    queries.index_scale = 8**-0.5
    want = pool_forward(queries, pool, block_table).lse_index
    assert want is not None
    assert lse.dtype == torch.float32
    assert float((lse - want).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_offset": -1}, "query_offset=-1"),
        ({"query_offset": 8}, "must not exceed"),
        ({"position": torch.zeros(3, dtype=torch.int64)}, "position.shape"),
        ({"query_valid": torch.ones(3, dtype=torch.bool)}, "query_valid.shape"),
        ({"local_blocks": 3}, "local_blocks=3"),
        ({"kernel": "fast"}, "kernel=fast"),
        ({"kernel": "triton"}, "kernel=triton"),
        ({"k_index": torch.zeros(10, 4)}, "S=10"),
        ({"q_index": torch.zeros(16, 4)}, "q_index.shape"),
        ({"q_index": torch.zeros(16, 0, 4)}, "num_kv_heads and D must be at least 1"),
        ({"q_index": torch.zeros(16, 2, 4, dtype=torch.int64)}, "q_index.dtype=torch.int64"),
        ({"k_index": torch.zeros(16, 4, device="meta")}, "k_index.device=meta: must be that of q_index, cpu"),
        ({"block_size": 0}, "block_size=0"),
        ({"topk": 0}, "topk=0"),
        ({"return_lse": True, "index_scale": 0.0}, "index_scale=0.0"),
        ({"position": torch.arange(16) + 1}, "position=16: must be from 0 to S - 1 = 15"),
        ({"position": torch.arange(16) - 1}, "position=-1"),
        ({"position": torch.arange(16).float()}, "position.dtype=torch.float32"),
        ({"query_valid": torch.ones(16)}, "query_valid.dtype=torch.float32"),
        ({"cu_seqlens": torch.tensor([16])}, "cu_seqlens.shape"),
        ({"cu_seqlens": torch.tensor([0.0, 16.0])}, "cu_seqlens.dtype=torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens=0..12: must begin at 0 and end at S=16"),
        ({"cu_seqlens": torch.tensor([0, 12, 8, 16])}, "a document of -4 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 16])}, "cu_seqlens=6: must be a multiple of block_size=4"),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "q_index": torch.zeros(16, 2, 4),
        "k_index": torch.zeros(16, 4),
        "cu_seqlens": torch.tensor([0, 16]),
        "block_size": 4,
        "topk": 2,
    }
    with pytest.raises(ValueError, match=words):
        select_blocks(**(arguments | change))  # type: ignore[arg-type]
