"""Which rows full attention gives to its kernel in one call, for packs of documents on many ranks."""

import pytest
import torch

from msa_train.config import KvExchange
from msa_train.parallel.attention.full_spans import Piece, plan_pieces
from msa_train.parallel.kv_exchange.full_plan import make_full_plan
from msa_train.parallel.sharding.partition import Range, zigzag_plan
from msa_train.parallel.sharding.shard_layout import Segment, ShardLayout, local_segments

# documents of 5, 8, 1 and 14 tokens in slots of whole blocks of 4, and padding at the end
EDGES, LENGTHS, SEQ_LEN = [0, 8, 16, 20, 36, 40], [5, 8, 1, 14, 0], 40


def seen(pieces: list[Piece], num_queries: int, num_keys: int) -> torch.Tensor:
    """How often each query sees each key of the source: [queries, keys]."""
    found = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    for piece in pieces:
        for call in piece.calls:
            assert len(call.queries.spans) == len(call.keys.spans)
            for (a, b), (c, d) in zip(call.queries.spans, call.keys.spans, strict=True):
                part = torch.ones(b - a, d - c, dtype=torch.int64)
                if call.causal:
                    assert d - c >= b - a
                    part = part.tril(d - c - (b - a))
                found[a:b, piece.rows.start + c : piece.rows.start + d] += part
    return found


def expected(segments: list[Segment], ranges: list[Range], num_queries: int) -> torch.Tensor:
    positions = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    found = torch.zeros(num_queries, positions.shape[0], dtype=torch.int64)
    for segment in segments:
        for i, query in enumerate(range(segment.start, segment.stop)):
            found[segment.row + i] = (positions >= segment.doc_start) & (positions <= query)
    return found


@pytest.mark.parametrize("most_keys", [None, 1, 3, 8])
@pytest.mark.parametrize("takes_offset", [False, True])
@pytest.mark.parametrize("queries", [[(0, 40)], [(0, 8), (32, 40)], [(12, 24)], [(20, 24), (28, 32)]])
@pytest.mark.parametrize("keys", [[(0, 40)], [(12, 24)], [(0, 4), (16, 20), (24, 32)], [(36, 40)]])
def test_every_visible_key_once(
    queries: list[Range], keys: list[Range], takes_offset: bool, most_keys: int | None
) -> None:
    segments = local_segments([*EDGES[:-1], SEQ_LEN], LENGTHS, queries)
    pieces = plan_pieces(segments, keys, takes_offset=takes_offset, most_keys=most_keys)
    num_queries, num_keys = (sum(b - a for a, b in ranges) for ranges in (queries, keys))
    want = expected(segments, keys, num_queries)
    assert torch.equal(seen(pieces, num_queries, num_keys), want)
    for piece in pieces:
        assert most_keys is None or piece.rows.stop - piece.rows.start <= most_keys
        if not takes_offset:
            spans = [zip(c.queries.spans, c.keys.spans, strict=True) for c in piece.calls if c.causal]
            assert all(q[1] - q[0] == k[1] - k[0] for pairs in spans for q, k in pairs)


def test_a_thousand_documents_take_one_or_two_calls() -> None:
    """On rank 32 of 64: its own keys in one call, those of the document that it shares in another."""
    block, docs, ranks = 32, 1000, 64
    edges = [i * 1056 for i in range(docs)]
    seq_len = -(-docs * 1056 // (ranks * block)) * ranks * block
    layout = ShardLayout(seq_len=seq_len, block_size=block, cp_rank=32, cp_size=ranks)
    plan = make_full_plan(
        layout, [*edges, seq_len], [1030] * docs, exchange=KvExchange.selected, balanced=False
    )
    own = plan_pieces(plan.segments, layout.ranges, takes_offset=True)
    remote = plan_pieces(plan.segments, plan.needed, takes_offset=True)
    assert [len(piece.calls) for piece in (*own, *remote)] == [1, 1]
    assert len(own[0].calls[0].keys.spans) > 15


def test_zigzag_ranks_take_a_call_for_each_run_of_queries() -> None:
    """Both runs want the keys between them and the first one: the same rows, so two calls."""
    layout = ShardLayout(seq_len=64, block_size=4, cp_rank=1, cp_size=4, split=zigzag_plan(64, 4))
    plan = make_full_plan(layout, [0, 64], [64], exchange=KvExchange.all_gather, balanced=False)
    (piece,) = plan_pieces(plan.segments, [(0, 64)], takes_offset=True)
    assert [(call.causal, call.keys.spans) for call in piece.calls] == [
        (True, [(0, plan.segments[0].stop)]),
        (True, [(0, plan.segments[1].stop)]),
    ]
