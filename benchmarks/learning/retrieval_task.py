"""Make packs of text mixed with key-value lookups over all distances.

A document is running text of a corpus, cut at random places by units of three tokens, `key value key`, like
an element between its tags. The first unit with a key is its record, with a value drawn at random; the later
ones are queries and repeat it, so that it can be known from an earlier unit with that key only. Example with
two keys (k, v: tokens outside the text's range, numbers tell them apart):

    tokens   d e f k7 v3 k7 _ f ( x k2 v9 k2 ) : k7 v3 k7 ; r e k2 v9 k2 t
    labels   e f . .  k7 _  f ( x . .  k2 )  : . v3 k7 ; r  e . v9 k2 t  .      . = not in the loss

What can be known counts in the loss: the value of a query, the closing key of every unit, and text after text
or after a unit. Where a unit begins, which key it has and the value of a record nobody can know.

The closing key says nothing new, but it makes the task learnable in a small budget: to predict it, a token
must look at the one before it, and that is the half of a lookup that is hard to learn from lookups alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from msa_train.data import IGNORE_LABEL, Pack
from msa_train.data.split import DocumentView

UNIT_TOKENS = 3
"tokens of a record and of a query: key, value, key"


@dataclass(kw_only=True, slots=True)
class Symbols:
    """Number the tokens of the lookups, outside the text's range."""

    first: int = 300
    "id of the first key; the text has bytes and one token at the end of each document, 256"
    num_keys: int = 128
    "keys; the ids of the values follow theirs"
    num_values: int = 64
    "values that a key may have"

    def __post_init__(self) -> None:
        for name in ("first", "num_keys", "num_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")

    @property
    def first_value(self) -> int:
        """Return the id of the first value."""
        return self.first + self.num_keys

    @property
    def vocab_size(self) -> int:
        """Count the ids from 0 up to the last value."""
        return self.first_value + self.num_values


@dataclass(kw_only=True, slots=True)
class Stage:
    """Describe some packs of the same make."""

    num_packs: int
    "how many there are"
    doc_len: int
    "tokens of each document"
    num_records: int
    "units in each document that give a key its value"
    num_queries: int
    "units in each document that repeat one"

    @property
    def text_len(self) -> int:
        """Count the tokens of text in each document: what its units of three leave."""
        return self.doc_len - UNIT_TOKENS * (self.num_records + self.num_queries)


@dataclass(slots=True)
class LookupPack:
    """Hold a pack and where its lookups are."""

    pack: Pack
    "tokens, labels and documents"
    query: npt.NDArray[np.int64]
    "[num_queries], positions of the queries' keys, ascending; the value is their label"
    distance: npt.NDArray[np.int64]
    "[num_queries], tokens back to the latest earlier unit with the same key"


@dataclass(slots=True)
class _Document:
    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    query: npt.NDArray[np.int64]
    distance: npt.NDArray[np.int64]


@dataclass(slots=True)
class RetrievalTask:
    """Make an endless row of packs; number i depends on the text, the settings and the seed alone."""

    view: DocumentView
    "text; a document of the task may run over from one of its documents into the next"
    seq_len: int
    "tokens of a pack"
    stages: Sequence[Stage]
    "what the packs are like, in this order; the last stage goes on for ever"
    seed: int
    "of everything drawn"
    symbols: Symbols = field(default_factory=Symbols)
    "ids of keys and values"
    _ends: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        for stage in self.stages:
            _check_stage(stage, self.seq_len, self.symbols)
        if not self.stages:
            raise ValueError("stages=[]: must name at least one stage")
        self._ends = np.cumsum(self.view.lengths)
        if not len(self._ends) or self._ends[-1] < self.seq_len:
            raise ValueError(
                f"corpus of {int(self.view.lengths.sum())} tokens: must have at least "
                f"seq_len={self.seq_len}; use a larger one"
            )

    def stage(self, index: int) -> Stage:
        """Find the stage of pack `index`, from 0."""
        for stage in self.stages:
            if index < stage.num_packs:
                return stage
            index -= stage.num_packs
        return self.stages[-1]

    def __getitem__(self, index: int) -> LookupPack:
        """Make pack number `index`, from 0.

        Raises:
            IndexError: for a negative number.
        """
        if index < 0:
            raise IndexError(f"pack {index}: packs are counted from 0 and have no end")
        stage = self.stage(index)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        num_docs = self.seq_len // stage.doc_len
        docs = [self._document(stage, rng) for _ in range(num_docs)]
        starts = np.arange(num_docs + 1, dtype=np.int64) * stage.doc_len
        pack = Pack(
            tokens=np.concatenate([doc.tokens for doc in docs]),
            labels=np.concatenate([doc.labels for doc in docs]),
            cu_seqlens=starts.astype(np.int32),
            doc_lengths=np.full(num_docs, stage.doc_len, np.int32),
        )
        query = np.concatenate([doc.query + start for doc, start in zip(docs, starts[:-1], strict=True)])
        return LookupPack(pack, query, np.concatenate([doc.distance for doc in docs]))

    def _document(self, stage: Stage, rng: np.random.Generator) -> _Document:
        num_units = stage.num_records + stage.num_queries
        gaps = np.sort(rng.integers(0, stage.text_len + 1, num_units))
        start = gaps + UNIT_TOKENS * np.arange(num_units)
        previous = previous_units(start, stage.num_records, stage.doc_len, rng)
        keys, values = self._symbols(previous, stage.num_records, rng)
        tokens = np.full(stage.doc_len, -1, np.int64)
        tokens[start], tokens[start + 1], tokens[start + 2] = keys, values, keys
        is_text = tokens < 0
        tokens[is_text] = self._text(stage.text_len, rng)
        labels = np.full(stage.doc_len, IGNORE_LABEL, np.int64)
        before_text = np.flatnonzero(is_text[1:])
        labels[before_text] = tokens[before_text + 1]
        is_query = previous >= 0
        query = start[is_query]
        labels[start + 1] = keys
        labels[query] = values[is_query]
        return _Document(tokens, labels, query, query - start[previous[is_query]])

    def _symbols(
        self, previous: npt.NDArray[np.int64], num_records: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Choose key and value of each unit: drawn for records, handed on to queries."""
        symbols, is_record = self.symbols, previous < 0
        keys, values = np.empty_like(previous), np.empty_like(previous)
        keys[is_record] = symbols.first + rng.permutation(symbols.num_keys)[:num_records]
        values[is_record] = symbols.first_value + rng.integers(0, symbols.num_values, num_records)
        for unit in np.flatnonzero(~is_record).tolist():
            keys[unit], values[unit] = keys[previous[unit]], values[previous[unit]]
        return keys, values

    def _text(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Read `count` tokens of the corpus from a random place on, over borders, round at the end."""
        begin = int(rng.integers(0, self._ends[-1]))
        doc = int(np.searchsorted(self._ends, begin, side="right"))
        start = begin - int(self._ends[doc] - self.view.lengths[doc])
        parts: list[npt.NDArray[np.int64]] = []
        while count > 0:
            part = self.view.read(doc, start, count)
            parts.append(part.astype(np.int64))
            count, start, doc = count - len(part), 0, (doc + 1) % len(self._ends)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def previous_units(
    start: npt.NDArray[np.int64], num_records: int, doc_len: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Choose the records, and for each query the latest earlier unit with the same key.

    Any units may be records, but the first one is. A query draws a distance, log-uniform up to doc_len, and
    takes the key whose latest unit comes nearest to it in proportion. Example: start [0, 10, 90, 100], unit
    1 a record too; unit 2 draws 85 and gets 0 -> [-1, -1, 0, ...]; unit 3 draws 9 and gets [-1, -1, 0, 2].

    Args:
        start: [num_units] first tokens, ascending.
        num_records: units that are records, at least 1 if there are units.
        doc_len: the largest distance.
        rng: draws records and distances.

    Returns:
        [num_units] int64 index of an earlier unit, -1 for records.
    """
    num_units = len(start)
    previous = np.full(num_units, -1, np.int64)
    is_record = np.zeros(num_units, np.bool_)
    is_record[:1] = True
    is_record[1 + rng.permutation(max(num_units - 1, 0))[: num_records - 1]] = True
    wanted = rng.uniform(np.log(UNIT_TOKENS), np.log(doc_len), num_units)
    # Latest unit of each key so far, in the order of the records.
    latest = np.empty(num_records, np.int64)
    num_keys = 0
    for unit in range(num_units):
        if is_record[unit]:
            latest[num_keys] = unit
            num_keys += 1
            continue
        distance = np.log(start[unit] - start[latest[:num_keys]])
        key = int(np.abs(distance - wanted[unit]).argmin())
        previous[unit], latest[key] = latest[key], unit
    return previous


def _check_stage(stage: Stage, seq_len: int, symbols: Symbols) -> None:
    if stage.num_packs < 1:
        raise ValueError(f"num_packs={stage.num_packs}: must be positive")
    if stage.doc_len < 1 or seq_len % stage.doc_len:
        raise ValueError(f"doc_len={stage.doc_len}: must divide seq_len={seq_len}")
    if not 0 <= stage.num_records <= symbols.num_keys:
        raise ValueError(
            f"num_records={stage.num_records}: must be from 0 to num_keys={symbols.num_keys}, "
            "as no key has two records in a document"
        )
    if stage.num_queries < 0 or (stage.num_queries and not stage.num_records):
        raise ValueError(
            f"num_queries={stage.num_queries}: must be at least 0, and 0 with num_records={stage.num_records}"
        )
    if stage.text_len < 0:
        raise ValueError(
            f"num_records={stage.num_records}, num_queries={stage.num_queries}: must fit into "
            f"doc_len={stage.doc_len}, {UNIT_TOKENS} tokens each"
        )
