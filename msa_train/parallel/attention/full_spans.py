"""Plan the kernel calls of full attention: which rows of a rank's queries see which rows of the keys at hand.

All documents of a pack share a call: each is a pair of spans in it, queries and the keys that they see. A
source of keys takes one call, or two where some pairs are causal and some are not, or more where two spans of
one document want the same keys.

Planning takes 1.3 us of the host for each segment and piece of a source, once per pack and source; the layers
of a pack share it. At 1,000 documents and one source that is 1 to 2 ms.

Shapes: U queries computed here, n rows of a source, N pairs of spans.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa_train.parallel.comm.to_device import to_device
from msa_train.parallel.sharding.partition import Range
from msa_train.parallel.sharding.shard_layout import Segment, visible_parts


@dataclass(slots=True)
class Rows:
    """Hold spans of rows of a tensor, ascending, no row in two of them."""

    spans: list[Range]
    "first row and row after the last of each span"
    _index: dict[torch.device, Tensor] = field(init=False, default_factory=dict, repr=False)

    @property
    def limits(self) -> list[int]:
        """List where the spans begin once they lie side by side, and their end: [N + 1].

        Example: [(2, 4), (6, 9)] -> [0, 2, 5].
        """
        limits = [0]
        for start, stop in self.spans:
            limits.append(limits[-1] + stop - start)
        return limits

    @property
    def is_slice(self) -> bool:
        """Tell whether the spans lie side by side, so that `take` gives a view."""
        return self._whole() is not None

    def is_all(self, num_rows: int) -> bool:
        """Tell whether these are all rows of a tensor."""
        return self._whole() == slice(0, num_rows)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """Pick the rows along a dimension; a view where the spans lie side by side."""
        whole = self._whole()
        if whole is not None:
            return x.narrow(dim, whole.start, whole.stop - whole.start)
        return x.index_select(dim, self._indices(x.device))

    def put(self, x: Tensor, rows: Tensor, dim: int = 0) -> None:
        """Overwrite the rows of `x`, in place."""
        whole = self._whole()
        if whole is not None:
            x.narrow(dim, whole.start, whole.stop - whole.start).copy_(rows)
        else:
            x.index_copy_(dim, self._indices(x.device), rows.to(x.dtype))

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add to the rows of `x` along its first dimension, in place, rounded to its dtype."""
        whole = self._whole()
        if whole is not None:
            x[whole].add_(rows)
        else:
            # no row twice, so the order in which a GPU adds does not matter
            x.index_add_(0, self._indices(x.device), rows.to(x.dtype))

    def _whole(self) -> slice | None:
        """Return the one slice that all spans make up, None where there are gaps."""
        gaps = any(a[1] != b[0] for a, b in zip(self.spans, self.spans[1:], strict=False))
        return None if gaps else slice(self.spans[0][0], self.spans[-1][1])

    def _indices(self, device: torch.device) -> Tensor:
        if device not in self._index:
            rows = torch.cat([torch.arange(start, stop) for start, stop in self.spans])
            self._index[device] = to_device(rows, device)
        return self._index[device]


@dataclass(slots=True)
class KernelCall:
    """Hold pairs of spans that one kernel call computes."""

    queries: Rows
    "of the U queries"
    keys: Rows
    "of the piece's keys, a span for each of the queries"
    causal: bool
    "the last query of a span sees all its keys, the one before it all but the last, ...; False: all see all"


@dataclass(slots=True)
class Piece:
    """Hold neighbouring rows of a source and the calls over them."""

    rows: slice
    "of the source"
    calls: list[KernelCall]
    "over these rows, counted from the first of them"


# Rows of queries, rows of keys, causal.
_Span = tuple[int, int, int, int, bool]


def plan_pieces(
    segments: Sequence[Segment], ranges: Sequence[Range], *, takes_offset: bool, most_keys: int | None = None
) -> list[Piece]:
    """Plan the calls over one source of keys.

    Args:
        segments: document parts among the U queries.
        ranges: positions of the source's rows in the pack, ascending.
        takes_offset: causal spans may have more keys than queries, so that keys before a segment and the
            segment's own go in one call.
        most_keys: rows of a piece at most; None: all rows are one piece.

    Example: queries 4..8 of a document from 0 on, keys 0..8 -> one piece, rows 0..8, with one call: query
    rows 0..4, key rows 0..8, causal. Without `takes_offset` two calls: key rows 4..8 causally, and 0..4.
    """
    pieces, row, first = [], 0, 0
    held: list[Range] = []
    for start, stop in ranges:
        while start < stop:
            room = stop - start if most_keys is None else min(most_keys - (row - first), stop - start)
            held.append((start, start + room))
            start, row = start + room, row + room
            if most_keys is not None and row - first == most_keys:
                pieces.append(Piece(slice(first, row), _calls(segments, held, takes_offset)))
                held, first = [], row
    if held:
        pieces.append(Piece(slice(first, row), _calls(segments, held, takes_offset)))
    return [piece for piece in pieces if piece.calls]


def _calls(segments: Sequence[Segment], ranges: Sequence[Range], takes_offset: bool) -> list[KernelCall]:
    spans = [span for segment in segments for span in _spans(segment, ranges, takes_offset)]
    return [*_grouped([s for s in spans if s[4]]), *_grouped([s for s in spans if not s[4]])]


def _spans(segment: Segment, ranges: Sequence[Range], takes_offset: bool) -> list[_Span]:
    """List what one segment sees of the keys at these positions, as few pairs as there can be."""
    whole = segment.rows(segment.start, segment.stop)
    # Keys before the segment are seen by all its queries. They lie side by side in the source whatever lies
    # between them in the pack: the order of keys does not matter.
    before: tuple[int, int] | None = None
    found: list[_Span] = []
    row = 0
    for start, stop in ranges:
        if start >= segment.stop:
            break
        if stop > segment.doc_start:
            for part in visible_parts(segment, start, stop):
                keys = row + part.start - start, row + part.stop - start
                if not part.causal and part.rows == whole:
                    before = (keys[0] if before is None else before[0], keys[1])
                else:
                    found.append((part.rows.start, part.rows.stop, *keys, part.causal))
        row += stop - start
    if before is None:
        return found
    own = (whole.start, whole.stop)
    if takes_offset and found and found[0][:2] == own and found[0][2] == before[1]:
        return [(*own, before[0], found[0][3], True), *found[1:]]
    return [*found, (*own, *before, False)]


def _grouped(spans: list[_Span]) -> Iterator[KernelCall]:
    """Put spans into calls, in each of which they ascend and no row is twice."""
    groups: list[list[_Span]] = []
    for span in sorted(spans):
        for group in groups:
            if group[-1][1] <= span[0] and group[-1][3] <= span[2]:
                group.append(span)
                break
        else:
            groups.append([span])
    for group in groups:
        queries, keys = [(s[0], s[1]) for s in group], [(s[2], s[3]) for s in group]
        yield KernelCall(Rows(queries), Rows(keys), group[0][4])
