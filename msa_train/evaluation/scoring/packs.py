"""Lay samples into packs: documents of their own, with labels at the tokens of the answers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_train.config import CpLayout, RunConfig
from msa_train.data import IGNORE_LABEL, Pack
from msa_train.evaluation.tasks.sample import Sample


@dataclass(slots=True)
class PackedDocuments:
    """Hold a pack and where its documents begin."""

    pack: Pack
    "as the training forward takes it"
    placed: list[tuple[int, int]]
    "(number of the document, first position), ascending"


@dataclass(frozen=True, slots=True)
class Document:
    """Hold what is laid into a pack."""

    tokens: npt.NDArray[np.int64]
    "[n]"
    labelled: tuple[tuple[int, int], ...]
    "ranges of tokens whose prediction is looked at; from 1 on, as nothing predicts the first one"


def document_of(sample: Sample) -> Document:
    """Take the answers of a sample as what is looked at."""
    return Document(sample.tokens, sample.answers)


def pack_unit(config: RunConfig) -> int:
    """Return what the length of a pack must be a multiple of.

    Example: blocks of 128, cp 4, zigzag, tp 2 -> 1,024.
    """
    parallel = config.parallel
    chunks = parallel.cp_size * (2 if parallel.cp_layout is CpLayout.zigzag else 1)
    # sequence parallelism cuts a rank's tokens once more
    return math.lcm(chunks * config.attention.block_size, parallel.cp_size * parallel.tp_size)


def pack_length(lengths: Sequence[int], *, unit: int, block_size: int, longest: int, num_ranks: int) -> int:
    """Choose the length of packs: room for the longest document, and no more than spreads all over the ranks.

    Example: 10 documents of 4,096 tokens, packs of at most 32,768, 2 ranks: 20,480 each. One of 100 tokens
    in blocks of 128, unit 1,024: 1,024.

    Args:
        lengths: tokens of the documents.
        unit: of the length, see `pack_unit`.
        block_size: alignment of documents.
        longest: no longer pack than this unless one document needs it.
        num_ranks: data-parallel ranks.
    """
    slots = [-(-length // block_size) * block_size for length in lengths]
    share = -(-sum(slots) // num_ranks)
    wanted = max(max(slots), min(share, longest))
    return -(-wanted // unit) * unit


def pack_documents(
    documents: Sequence[Document], *, num_tokens: int, block_size: int
) -> list[PackedDocuments]:
    """Lay documents into packs in their order, each on a block boundary; a full pack is followed by another.

    Example: documents of 3 and 2 tokens in blocks of 4 and packs of 8: starts 0 and 4, cu_seqlens [0, 4, 8];
    the first one [5, 6, 7] with labelled (2, 3) has label 7 at position 1.
    """
    packs: list[PackedDocuments] = []
    row: list[tuple[int, int]] = []
    place = 0
    for number, document in enumerate(documents):
        slot = -(-len(document.tokens) // block_size) * block_size
        assert slot <= num_tokens, "packs are made for the longest document"
        if place + slot > num_tokens:
            packs.append(_lay(documents, row, num_tokens))
            row, place = [], 0
        row.append((number, place))
        place += slot
    if row:
        packs.append(_lay(documents, row, num_tokens))
    return packs


def _lay(documents: Sequence[Document], row: list[tuple[int, int]], num_tokens: int) -> PackedDocuments:
    tokens = np.zeros(num_tokens, np.int64)
    labels = np.full(num_tokens, IGNORE_LABEL, np.int64)
    for number, place in row:
        document = documents[number]
        tokens[place : place + len(document.tokens)] = document.tokens
        for start, stop in document.labelled:
            labels[place + start - 1 : place + stop - 1] = document.tokens[start:stop]
    cu_seqlens = np.array([*(place for _, place in row), num_tokens], np.int32)
    lengths = np.array([len(documents[number].tokens) for number, _ in row], np.int32)
    return PackedDocuments(Pack(tokens, labels, cu_seqlens, lengths), row)
