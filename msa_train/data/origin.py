"""Tell where the tokens of packs come from: source, length of the document, and how it was made.

Cost: for each piece of a pack a binary search in the mapped .idx; no memory of its own, nothing is sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_train.config.mixture.settings import BUCKET_EDGES, BUCKETS

MADE_BY = ("as_is", "repository_imports", "repository_paths", "chapters", "topic", "synthesized")
"how a document was made; a number in a cache's provenance.dat is a place in this list, so only append to it"


@dataclass(slots=True)
class PackOrigin:
    """Tell where the documents of one pack come from."""

    source: str
    "of the mixture; empty where the run has one corpus"
    bucket: npt.NDArray[np.uint8]
    "[num_docs] place in BUCKETS of the whole document, of which the pack may hold a part"
    made_by: npt.NDArray[np.uint8]
    "[num_docs] place in MADE_BY"


def bucket_of(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Return the place in BUCKETS of each length: [n] uint8; [8191, 8192] -> [0, 1]."""
    return np.searchsorted(np.array(BUCKET_EDGES), lengths, side="right").astype(np.uint8)


class OriginCounter:
    """Count real tokens by origin, for one step.

    Args:
        sources: names of the mixture's sources; none where the run has one corpus.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = sorted(sources) or [""]
        self.size = len(self._sources) * len(BUCKETS) + len(MADE_BY)

    def count(self, origins: Sequence[tuple[PackOrigin | None, npt.NDArray[np.integer]]]) -> list[float]:
        """Return tokens by source and bucket, then by how documents were made: [size].

        Args:
            origins: of each pack, with its doc_lengths; packs that tell nothing are left out.
        """
        by_bucket = np.zeros((len(self._sources), len(BUCKETS)))
        by_making = np.zeros(len(MADE_BY))
        for origin, doc_lengths in origins:
            if origin is None:
                continue
            row = by_bucket[self._sources.index(origin.source)]
            row += np.bincount(origin.bucket, doc_lengths, minlength=len(BUCKETS))
            by_making += np.bincount(origin.made_by, doc_lengths, minlength=len(MADE_BY))
        return [*by_bucket.ravel().tolist(), *by_making.tolist()]

    def shares(self, counts: Sequence[float]) -> dict[str, dict[str, float]]:
        """Return shares of the step's tokens by key of metrics; sources and makings only where there are any.

        Args:
            counts: sums of `count` over ranks; each pack may have been counted equally often.

        Example: 30 tokens of books in 8K-32K and 10 of web in under_8K -> tokens_by_bucket {"under_8K": 0.25,
        "8K-32K": 0.75, ...}, tokens_by_source {"books": 0.75, "web": 0.25}.
        """
        edge = len(self._sources) * len(BUCKETS)
        by_bucket = np.array(counts[:edge]).reshape(len(self._sources), len(BUCKETS))
        total = by_bucket.sum()
        if not total:
            return {}
        by_bucket /= total
        by_making = np.array(counts[edge:]) / total
        shares = {"tokens_by_bucket": _named(BUCKETS, by_bucket.sum(0))}
        if self._sources != [""]:
            shares["tokens_by_source"] = _named(self._sources, by_bucket.sum(1))
            pairs = [f"{source}_{bucket}" for source in self._sources for bucket in BUCKETS]
            both = _named(pairs, by_bucket.ravel())
            shares["tokens_by_source_bucket"] = {name: share for name, share in both.items() if share}
        if by_making[1:].any():
            making = _named(MADE_BY, by_making)
            shares["tokens_by_making"] = {name: share for name, share in making.items() if share}
        return shares


def _named(names: Sequence[str], values: npt.NDArray[np.floating]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
