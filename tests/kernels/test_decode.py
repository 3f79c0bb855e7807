"""Decoding on the CPU paths: against the definition, and against prefill operators on the last token."""

from typing import Any

import pytest
import torch
from msa_kernels import DecodeCache, block_sparse_attention, decode_attention, select_blocks
from torch import Tensor

from tests.helpers.compare import assert_rows_close

BLOCK = 4


def _flat_cache(lengths: list[int], *, groups: int = 2, dim: int = 8, capacity: int = 64) -> DecodeCache:
    """Random rows up to each length, NaN after it: what is not there must not be read."""
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, len(lengths), capacity, groups, dim, generator=generator, dtype=torch.float64)
    k_index = torch.randn(len(lengths), capacity, dim, generator=generator, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for rows in (k, v, k_index):
            rows[b, length:] = float("nan")
    return DecodeCache(k, v, k_index)


def _paged(cache: DecodeCache, page_size: int) -> DecodeCache:
    """The same cache in pages that lie in random order; the table of a sequence's end points nowhere."""
    batch, capacity = cache.k.shape[:2]
    count = capacity // page_size
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(2))
    pages = [torch.empty_like(rows.reshape(-1, page_size, *rows.shape[2:])) for rows in _rows(cache)]
    for target, rows in zip(pages, _rows(cache), strict=True):
        target[order] = rows.reshape(-1, page_size, *rows.shape[2:])
    return DecodeCache(*pages, page_table=order.view(batch, count).to(torch.int32))


def _rows(cache: DecodeCache) -> tuple[Tensor, Tensor, Tensor]:
    return cache.k, cache.v, cache.k_index


def _queries(batch: int, *, heads: int = 6, groups: int = 2, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(batch, heads, dim, generator=generator, dtype=torch.float64)
    return q, torch.randn(batch, groups, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("page_size", [None, 8, 32], ids=["flat", "small_pages", "large_pages"])
@pytest.mark.parametrize(("topk", "local_blocks"), [(3, 1), (2, 2), (40, 1)])
def test_equals_definition(page_size: int | None, topk: int, local_blocks: int) -> None:
    """Whole and partial last blocks, a sequence of one token, and one that is not there."""
    lengths = [64, 29, 1, 0, 40]
    cache = _flat_cache(lengths)
    if page_size is not None:
        cache = _paged(cache, page_size)
    arguments: dict[str, Any] = {"block_size": BLOCK, "topk": topk, "local_blocks": local_blocks}
    inputs = (*_queries(5), cache, torch.tensor(lengths))
    out, lse, blocks = decode_attention(*inputs, kernel="cpu", **arguments)
    want_out, want_lse, want_blocks = decode_attention(*inputs, kernel="reference", **arguments)
    assert torch.equal(blocks, want_blocks)
    assert_rows_close(out, want_out, 1e-12)
    there = torch.tensor(lengths) > 0
    assert_rows_close(lse[there], want_lse[there], 1e-12)
    assert (lse[~there] == float("-inf")).all()
    assert (out[~there] == 0).all()


def test_equals_last_token_of_prefill() -> None:
    cache = _flat_cache([64])
    q, q_index = _queries(1)
    out, lse, blocks = decode_attention(
        q, q_index, cache, torch.tensor([64]), block_size=BLOCK, topk=5, softmax_scale=0.3
    )
    starts = torch.tensor([0, 64])
    selected = select_blocks(q_index, cache.k_index[0], starts, block_size=BLOCK, topk=5, query_offset=63)
    want_out, want_lse = block_sparse_attention(
        q, cache.k[0], cache.v[0], selected, block_size=BLOCK, softmax_scale=0.3, query_offset=63
    )
    assert torch.equal(blocks, selected)
    assert_rows_close(out, want_out, 1e-12)
    assert_rows_close(lse, want_lse, 1e-12)


def test_long_pages_are_scored_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from msa_kernels.decode import op

    cache, inputs = _flat_cache([63, 20]), _queries(2)
    lengths = torch.tensor([63, 20])
    want = decode_attention(*inputs, cache, lengths, block_size=BLOCK, topk=4)
    monkeypatch.setattr(op, "_TOKENS_PER_TILE", 10)
    got = decode_attention(*inputs, cache, lengths, block_size=BLOCK, topk=4)
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_lens": torch.tensor([65])}, "seq_lens=65"),
        ({"seq_lens": torch.tensor([-1])}, "seq_lens=-1"),
        ({"seq_lens": torch.tensor([1, 1])}, "seq_lens.shape"),
        ({"local_blocks": 4}, "local_blocks=4"),
        ({"q": torch.zeros(1, 5, 8)}, "H=5"),
        ({"q": torch.zeros(1, 6, 4)}, "q.shape"),
        ({"q_index": torch.zeros(1, 6, 8)}, "q_index.shape"),
        (
            {"cache": DecodeCache(torch.zeros(1, 64, 2, 8), torch.zeros(1, 64, 2, 8), torch.zeros(1, 8))},
            "k_index",
        ),
        (
            {"cache": DecodeCache(torch.zeros(1, 64, 2, 8), torch.zeros(1, 64, 1, 8), torch.zeros(1, 64, 8))},
            "v.shape",
        ),
        ({"kernel": "triton"}, "kernel=triton"),
        ({"topk": 0, "local_blocks": 0}, "topk=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"seq_lens": torch.tensor([64.0])}, "seq_lens.dtype=torch.float32"),
        ({"q": torch.zeros(1, 6, 8, dtype=torch.int32)}, "q.dtype=torch.int32"),
        ({"q": torch.zeros(1, 6, 8, device="meta")}, "q.device=meta: must be that of k, cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    q, q_index = _queries(1)
    arguments: dict[str, Any] = {
        "q": q,
        "q_index": q_index,
        "cache": _flat_cache([64]),
        "seq_lens": torch.tensor([64]),
        "block_size": BLOCK,
        "topk": 3,
    }
    with pytest.raises(ValueError, match=words):
        decode_attention(**(arguments | change))


def test_pages_hold_whole_blocks() -> None:
    cache = _paged(_flat_cache([64]), 16)
    with pytest.raises(ValueError, match="page_size=16"):
        decode_attention(*_queries(1), cache, torch.tensor([64]), block_size=12, topk=3)


def test_pages_that_are_not_there() -> None:
    """Only pages that hold tokens are looked at: the rest of a table may hold anything."""
    cache = _paged(_flat_cache([64]), 16)
    assert cache.page_table is not None
    cache.page_table[0, 2:] = 99
    decode_attention(*_queries(1), cache, torch.tensor([32]), block_size=BLOCK, topk=3)
    with pytest.raises(ValueError, match="page_table=99: must be from 0 to the last page, 3"):
        decode_attention(*_queries(1), cache, torch.tensor([33]), block_size=BLOCK, topk=3)
    floats = DecodeCache(cache.k, cache.v, cache.k_index, page_table=cache.page_table.float())
    with pytest.raises(ValueError, match=r"page_table.dtype=torch.float32"):
        decode_attention(*_queries(1), floats, torch.tensor([32]), block_size=BLOCK, topk=3)
