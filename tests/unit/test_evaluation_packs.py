"""Samples in packs: labels where answers are, places that lead back, lengths that every layout can cut."""

import numpy as np

from msa_train.config import CpLayout, ParallelConfig, RunConfig
from msa_train.data import IGNORE_LABEL
from msa_train.evaluation.scoring.needle_rate import _queries
from msa_train.evaluation.scoring.packs import Document, pack_documents, pack_length, pack_unit
from msa_train.evaluation.tasks.sample import Needle, Sample
from msa_train.parallel.sharding.shard_layout import ShardLayout

NONE = IGNORE_LABEL


def document(*tokens: int, labelled: tuple[int, int]) -> Document:
    return Document(np.array(tokens, np.int64), (labelled,))


def test_worked_example() -> None:
    documents = [
        document(5, 6, 7, labelled=(2, 3)),
        document(8, 9, labelled=(1, 2)),
        document(1, 2, 3, 4, 5, labelled=(3, 5)),
    ]
    first, second = pack_documents(documents, num_tokens=8, block_size=4)
    assert first.placed == [(0, 0), (1, 4)]
    assert first.pack.tokens.tolist() == [5, 6, 7, 0, 8, 9, 0, 0]
    assert first.pack.labels.tolist() == [NONE, 7, NONE, NONE, 9, NONE, NONE, NONE]
    assert first.pack.cu_seqlens.tolist() == [0, 4, 8]
    assert first.pack.doc_lengths.tolist() == [3, 2]
    assert second.placed == [(2, 0)]
    assert second.pack.labels.tolist() == [NONE, NONE, 4, 5, NONE, NONE, NONE, NONE]
    assert second.pack.cu_seqlens.tolist() == [0, 8]


def test_length_of_packs() -> None:
    sizes = {"unit": 1024, "block_size": 128}
    assert pack_length([4096] * 10, longest=32_768, num_ranks=2, **sizes) == 20_480
    assert pack_length([4096] * 10, longest=8192, num_ranks=2, **sizes) == 8192
    assert pack_length([100], longest=32_768, num_ranks=8, **sizes) == 1024
    # a document longer than the stage's packs has a pack of its own length
    assert pack_length([9000, 10], longest=4096, num_ranks=8, **sizes) == 9216


def test_unit_of_packs() -> None:
    config = RunConfig(parallel=ParallelConfig(cp_size=4, tp_size=2))
    assert pack_unit(config) == 4 * config.attention.block_size
    config.parallel.cp_layout = CpLayout.zigzag
    assert pack_unit(config) == 8 * config.attention.block_size


def test_queries_and_blocks_of_a_needle() -> None:
    """Blocks of 4; the sample begins at position 8: needle tokens 3 to 6, answer tokens 9 and 10."""
    sample = Sample(
        task="niah",
        length=12,
        index=0,
        prompt="",
        prefix="",
        references=("x",),
        tokens=np.arange(11),
        answers=((9, 11),),
        needles=(Needle(3, 7, 0),),
        depth=None,
        ordered=True,
    )
    other = document(*range(7), labelled=(1, 2))
    packed = pack_documents([other, Document(sample.tokens, sample.answers)], num_tokens=24, block_size=4)
    samples = [sample, sample]
    packed[0].placed = packed[0].placed[1:]
    ((rows, blocks),) = _queries(packed[0], samples, ShardLayout(24, 4, 0, 1))
    assert rows.tolist() == [16, 17]
    assert blocks.tolist() == [2, 3]
    # the second of two ranks holds positions 12 to 23
    ((rows, _),) = _queries(packed[0], samples, ShardLayout(24, 4, 1, 2))
    assert rows.tolist() == [4, 5]
    assert not _queries(packed[0], samples, ShardLayout(24, 4, 0, 2))
