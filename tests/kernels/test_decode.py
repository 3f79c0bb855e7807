"""Decoding on the CPU paths: against the definition, and against prefill operators on the last token."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from msa_kernels import (
    DecodeCache,
    block_sparse_attention,
    decode_attention,
    quantize_index_keys,
    select_blocks,
)
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


@pytest.mark.parametrize("page_size", [None, 16], ids=["flat", "paged"])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_fp8_index_keys(page_size: int | None, kernel: str) -> None:
    """As with the keys that they stand for, kept in 64 bits; others than the keys they were made of."""
    lengths = [64, 29, 0]
    exact = _flat_cache(lengths)
    keys, scale = quantize_index_keys(exact.k_index)
    restored = keys.double() * scale[..., None]
    wide = DecodeCache(exact.k, exact.v, restored)
    cache = DecodeCache(exact.k, exact.v, keys, k_index_scale=scale)
    if page_size is not None:
        wide = _paged(wide, page_size)
        keys, scale = quantize_index_keys(wide.k_index)
        cache = DecodeCache(wide.k, wide.v, keys, page_table=wide.page_table, k_index_scale=scale)
    arguments: dict[str, Any] = {"block_size": BLOCK, "topk": 5, "kernel": kernel}
    inputs, seq_lens = _queries(3), torch.tensor(lengths)
    got = decode_attention(*inputs, cache, seq_lens, **arguments)
    want = decode_attention(*inputs, wide, seq_lens, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_fp8_keys_are_near() -> None:
    """Within half a step of 4 significant bits, with the least power of two that fits; zeros stay zeros."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(200, 16, generator=generator) * torch.logspace(-30, 30, 200)[:, None]
    rows[0], rows[1] = 0.0, torch.full((16,), 448.0)
    rows[2, 0], rows[2, 1:] = 3.0, -500.0
    keys, scale = quantize_index_keys(rows)
    assert keys.dtype == torch.float8_e4m3fn
    assert scale[:3].tolist() == [1.0, 1.0, 2.0]
    assert keys[2, :2].float().tolist() == [1.5, -256.0]
    largest = rows.abs().amax(1, keepdim=True)
    assert bool((largest <= 448 * scale[:, None]).all())
    assert bool((largest[3:] > 224 * scale[3:, None]).all())
    error = (keys.float() * scale[:, None] - rows).abs()
    assert bool((error <= torch.maximum(rows.abs() / 16, largest * 2**-17)).all())


def test_fp8_keys_need_a_scale() -> None:
    cache, seq_lens = _flat_cache([64]), torch.tensor([64])
    keys, scale = quantize_index_keys(cache.k_index)
    for change, words in (
        ({"k_index": keys}, "k_index_scale=None"),
        ({"k_index_scale": scale}, "k_index_scale: must be None"),
        ({"k_index": keys, "k_index_scale": scale[:, 1:]}, r"k_index_scale.shape=\(1, 63\)"),
        ({"k_index": keys, "k_index_scale": scale.double()}, "dtype=torch.float64"),
        ({"k_index": keys.float().to(torch.float8_e5m2)}, "k_index.dtype=torch.float8_e5m2"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_attention(*_queries(1), replace(cache, **change), seq_lens, block_size=BLOCK, topk=3)


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
