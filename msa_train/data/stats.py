"""Count documents and tokens by length and source, and say what stages can learn from them.

A stage trains attention over a long range only where a token has that much of its own document before it:
documents in a pack do not see each other. So a pack full of short documents is a short batch at the price of
a long one, and what counts is the share of tokens with more before them than earlier stages had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from msa_train.config import RunConfig, Stage, plan_stages
from msa_train.config.mixture.rules import stage_weights
from msa_train.config.mixture.settings import BUCKETS, SourceWeight, read_sources
from msa_train.data.load import OpenCorpus
from msa_train.data.mixture.sources import prepare_mixture, source_data
from msa_train.data.origin import MADE_BY, bucket_of
from msa_train.data.prepare import Corpus, Log, prepare_corpus

LITTLE = 0.05
"share of tokens with a long range below which a stage has little to learn from"
MANY_EPOCHS = 4.0
"readings of the same documents above which a stage is said to repeat itself"
_LONGEST = 5
_LONG = 128 << 10
"tokens of packs that are meant for long documents"


@dataclass(slots=True)
class SourceLengths:
    """Hold the lengths of a source's documents, held-out ones included."""

    lengths: npt.NDArray[np.int64]
    "[num_documents] tokens, none of them 0"
    numbers: npt.NDArray[np.int64]
    "[num_documents] place in the corpus, from 0 on"
    made_by: npt.NDArray[np.uint8]
    "[num_documents] place in origin.MADE_BY"


@dataclass(slots=True)
class PartReading:
    """Say what a stage reads of one bucket of a source."""

    source: str
    "of the mixture; empty where the run has one corpus"
    bucket: str
    "one of BUCKETS"
    share: float
    "of the stage's tokens"
    epochs: float
    "how often its documents are read in the stage"


@dataclass(slots=True)
class StageReading:
    """Say what a stage can learn from."""

    name: str
    "of the stage"
    seq_len: int
    "tokens of its packs"
    tokens: int
    "of the whole stage, padding included"
    beyond: int
    "tokens that earlier stages had before a token at most"
    long_share: float
    "of its tokens, those with more than `beyond` tokens of their document before them"
    longest: int
    "tokens of the longest document that it draws"
    parts: list[PartReading]
    "what it draws"

    def sentences(self) -> list[str]:
        """Say in plain words what there is to learn, and what is read too often."""
        what = f"stage {self.name} ({self.tokens:,} tokens in packs of {self.seq_len:,})"
        fix = "make long documents (msa-data prepare), or give long sources and buckets more weight"
        if not self.long_share:
            first = (
                f"{what}: NOTHING TO LEARN FROM: no document that it draws has more than {self.beyond:,} "
                f"tokens, the longest has {self.longest:,}; a pack of short documents trains no long range; "
                f"{fix}"
            )
        elif self.long_share < LITTLE:
            first = (
                f"{what}: little to learn from: {self.long_share:.2%} of its tokens have more than "
                f"{self.beyond:,} tokens of their document before them; {fix}"
            )
        else:
            first = f"{what}: {self.long_share:.1%} of its tokens have more than {self.beyond:,} before them"
        often = [part for part in self.parts if part.epochs > MANY_EPOCHS]
        return [
            first,
            *(f"{what}: reads {_part_name(part)} {part.epochs:.1f} times over" for part in often),
        ]


def _part_name(part: PartReading) -> str:
    return f"{part.source} {part.bucket}".strip()


def read_lengths(config: RunConfig, *, log: Log | None = None) -> dict[str, SourceLengths]:
    """Prepare the data of a run and read the lengths of all documents, by source ("" for one corpus).

    Tokenizes what is not in data.cache_dir yet. Memory: 17 bytes per document.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    if config.data.mixture:
        # a bucket without documents is what the table is to show
        return prepared_lengths(config, prepare_mixture(config, log=log, check=False))
    vocab_size = config.model.vocab_size
    corpus = prepare_corpus(config.data, vocab_size=vocab_size, log=log, run_dir=config.run_dir)
    return prepared_lengths(config, corpus)


def prepared_lengths(config: RunConfig, prepared: Corpus) -> dict[str, SourceLengths]:
    """Read the lengths of all documents of data that `prepare_run` has prepared; see `read_lengths`."""
    if not config.data.mixture:
        return {"": _lengths(OpenCorpus(config.data, prepared, config.model.vocab_size), prepared)}
    found: dict[str, SourceLengths] = {}
    for name, source in read_sources(config.data.mixture).items():
        corpus = prepared.source(name)
        data = source_data(config.data, source, config.data.seq_len)
        found[name] = _lengths(OpenCorpus(data, corpus, config.model.vocab_size, name), corpus)
    return found


def _lengths(opened: OpenCorpus, corpus: Corpus) -> SourceLengths:
    lengths = opened.store.lengths
    numbers = np.flatnonzero(lengths)
    made_by = opened.made_by
    kinds = np.zeros(corpus.num_documents, np.uint8) if made_by is None else np.asarray(made_by)
    return SourceLengths(lengths[numbers], numbers, kinds[numbers])


def bucket_rows(sources: Mapping[str, SourceLengths]) -> list[dict[str, Any]]:
    """Return a row per source and bucket: documents, tokens, share of all tokens; plain JSON."""
    total = sum(int(source.lengths.sum()) for source in sources.values())
    rows: list[dict[str, Any]] = []
    for name, source in sources.items():
        codes = bucket_of(source.lengths)
        for code, bucket in enumerate(BUCKETS):
            lengths = source.lengths[codes == code]
            tokens = int(lengths.sum())
            row = {"source": name, "bucket": bucket, "documents": len(lengths), "tokens": tokens}
            rows.append(row | {"share": tokens / max(total, 1)})
    return rows


def making_rows(sources: Mapping[str, SourceLengths]) -> list[dict[str, Any]]:
    """Return a row per source and way in which its documents were made: documents and tokens; plain JSON."""
    rows: list[dict[str, Any]] = []
    for name, source in sources.items():
        for code in np.unique(source.made_by).tolist():
            lengths = source.lengths[source.made_by == code]
            row = {"source": name, "made_by": MADE_BY[code], "documents": len(lengths)}
            rows.append(row | {"tokens": int(lengths.sum())})
    return rows


def longest_rows(sources: Mapping[str, SourceLengths], count: int = _LONGEST) -> list[dict[str, Any]]:
    """Return the longest documents of each source, the longest first: number in the corpus and tokens."""
    rows: list[dict[str, Any]] = []
    for name, source in sources.items():
        for place in np.argsort(-source.lengths, kind="stable")[:count].tolist():
            number, tokens = int(source.numbers[place]), int(source.lengths[place])
            made_by = MADE_BY[int(source.made_by[place])]
            rows.append({"source": name, "document": number, "tokens": tokens, "made_by": made_by})
    return rows


def stage_readings(config: RunConfig, sources: Mapping[str, SourceLengths]) -> list[StageReading]:
    """Compare every stage of a run with its documents.

    A stage is compared with the longest packs before it; the first one with half of its own.
    """
    weights, readings = stage_weights(config), []
    longest_before = 0
    for stage in plan_stages(config):
        of_stage = weights.get(stage.name) or {name: SourceWeight(weight=1.0) for name in sources}
        beyond = longest_before or stage.seq_len // 2
        # a stage of shorter packs has no new range
        beyond = beyond if beyond < stage.seq_len else stage.seq_len // 2
        readings.append(_reading(stage, beyond, of_stage, sources))
        longest_before = max(longest_before, stage.seq_len)
    return readings


def learning_warnings(config: RunConfig, prepared: Corpus) -> list[str]:
    """Name the stages whose long packs have nothing to learn from, for the start of a run.

    Those are stages longer than an earlier one, and any from `_LONG` tokens on: shorter packs may well be
    full of whole documents. Where there is one, 17 bytes of each document are in memory, and a stage takes
    0.07 s of a core for a million documents (measured with 12 million).
    """
    lengths = [stage.seq_len for stage in plan_stages(config)]
    if max(lengths) < _LONG and max(lengths) == lengths[0]:
        return []
    readings = stage_readings(config, prepared_lengths(config, prepared))
    extends = [
        reading.seq_len > max(lengths[:place], default=_LONG - 1) for place, reading in enumerate(readings)
    ]
    return [
        reading.sentences()[0]
        for reading, is_longer in zip(readings, extends, strict=True)
        if is_longer and not reading.long_share
    ]


def _reading(
    stage: Stage,
    beyond: int,
    weights: Mapping[str, SourceWeight],
    sources: Mapping[str, SourceLengths],
) -> StageReading:
    tokens = stage.tokens_at(stage.last_step) - stage.first_token
    all_weights = sum(weight.weight for weight in weights.values())
    parts: list[PartReading] = []
    long_share, longest = 0.0, 0
    for name, weight in weights.items():
        lengths, codes = sources[name].lengths, bucket_of(sources[name].lengths)
        in_buckets = weight.buckets or {
            bucket: float(lengths[codes == code].sum()) for code, bucket in enumerate(BUCKETS)
        }
        for bucket, value in in_buckets.items():
            share = weight.weight / all_weights * value / sum(in_buckets.values())
            drawn = lengths[codes == BUCKETS.index(bucket)]
            if not share or not len(drawn):
                continue
            epochs = share * tokens / float(drawn.sum())
            parts.append(PartReading(name, bucket, share, epochs))
            long_share += share * _beyond(drawn, stage.seq_len, beyond) / float(drawn.sum())
            longest = max(longest, int(drawn.max()))
    return StageReading(stage.name, stage.seq_len, tokens, beyond, long_share, longest, parts)


def _beyond(lengths: npt.NDArray[np.int64], seq_len: int, beyond: int) -> int:
    """Count the tokens with more than `beyond` tokens of their document's piece before them.

    Example: packs of 8 tokens, beyond 4: a document of 19 tokens has pieces of 8, 8 and 3, with 4 + 4 + 0.
    """
    full, rest = np.divmod(lengths, seq_len)
    return int((full * (seq_len - beyond)).sum() + np.maximum(rest - beyond, 0).sum())


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write rows as aligned columns under their keys; shares in percent, numbers with commas."""
    if not rows:
        return []
    keys = [key for key in rows[0] if any(row[key] != "" for row in rows)]
    cells = [keys, *([_cell(key, row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    right = [not isinstance(rows[0][key], str) for key in keys]
    return [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key == "share" else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) and key != "document" else str(value)
