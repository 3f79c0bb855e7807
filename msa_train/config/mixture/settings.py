"""Read data.mixture and stages.NAME.mixture: named sources, their weights and those of their buckets.

A bucket is a class of documents by their length in tokens, the end of the document included. K is 1,024: a
document of 8,192 tokens is in 8K-32K, one of 8,191 in under_8K.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

BUCKET_EDGES = (8 << 10, 32 << 10, 128 << 10, 512 << 10)
"tokens from which a document is in the next bucket"
BUCKETS = ("under_8K", "8K-32K", "32K-128K", "128K-512K", "over_512K")
_KEYS = ("corpus", "weight", "buckets")
_NAME = re.compile(r"[A-Za-z]\w*")


@dataclass(kw_only=True, slots=True)
class SourceSettings:
    """Hold one source of a mixture as the user writes it."""

    name: str
    "its key in data.mixture"
    corpus: str
    "what data.corpus may be"
    weight: float = 1.0
    "share of the tokens, relative to the other sources'; 0: only stages that name it take from it"
    buckets: dict[str, float] = field(default_factory=dict[str, float])
    "shares of its buckets, relative to each other; empty: as many of each as there are"


@dataclass(kw_only=True, slots=True)
class SourceWeight:
    """Hold what share of the tokens comes from a source in one stage."""

    weight: float
    "relative to the other sources'"
    buckets: dict[str, float] = field(default_factory=dict[str, float])
    "relative to each other; empty: as many of each as there are"


def read_sources(mixture: Mapping[str, Any]) -> dict[str, SourceSettings]:
    """Read data.mixture; empty where the run has none and trains on data.corpus.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    sources: dict[str, SourceSettings] = {}
    for name, entry in mixture.items():
        key = f"data.mixture.{name}"
        if not _NAME.fullmatch(str(name)):
            raise ValueError(f"{key}: must be a name of letters, digits and _, such as data.mixture.books")
        if not isinstance(entry, Mapping):
            raise ValueError(f"{key}={entry}: must be a source; use {key}={{corpus: PATH, weight: 1}}")
        sources[name] = _read_source(name, key, cast(Mapping[str, Any], entry))
    _check_corpora(sources)
    if sources and not any(source.weight for source in sources.values()):
        raise ValueError(
            "data.mixture: all weights are 0, so there is nothing to train on; use "
            f"data.mixture.{next(iter(sources))}.weight=1"
        )
    return sources


def _read_source(name: str, key: str, entry: Mapping[str, Any]) -> SourceSettings:
    for part in entry:
        if part not in _KEYS:
            raise ValueError(f"{key}.{part}: there is no such key; use one of {', '.join(_KEYS)}")
    corpus = entry.get("corpus")
    if not isinstance(corpus, str) or not corpus.strip():
        raise ValueError(
            f"{key}.corpus={'' if corpus is None else corpus}: must be a file, folder or glob; "
            f"use {key}.corpus=PATH"
        )
    return SourceSettings(
        name=name,
        corpus=corpus,
        weight=_weight(f"{key}.weight", entry.get("weight", 1.0)),
        buckets=_buckets(f"{key}.buckets", entry.get("buckets") or {}),
    )


def _check_corpora(sources: Mapping[str, SourceSettings]) -> None:
    """Refuse a corpus in two sources: its documents would come twice within an epoch."""
    first: dict[str, str] = {}
    for source in sources.values():
        corpus = source.corpus.rstrip("/")
        if corpus in first:
            raise ValueError(
                f"data.mixture.{source.name}.corpus={source.corpus}: is that of data.mixture.{first[corpus]} "
                "too, so its documents would come twice; leave one out and add up the weights"
            )
        first[corpus] = source.name


def read_weights(
    sources: Mapping[str, SourceSettings], given: Mapping[str, Any], key: str
) -> dict[str, SourceWeight]:
    """Return the weights of a stage, by source; those that are 0 are left out.

    Args:
        sources: of the run.
        given: the stage's `mixture`; empty: the run's weights.
        key: of `given`, for messages.

    Example: sources a and b of weight 1 and {"a": 2, "b": {"8K-32K": 1, "over_512K": 3}} -> a has 2 of 6
    parts, in its own buckets; b has 4 of 6, a quarter of that in 8K-32K.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if not given:
        weights = {s.name: SourceWeight(weight=s.weight, buckets=s.buckets) for s in sources.values()}
        return {name: weight for name, weight in weights.items() if weight.weight}
    if not sources:
        raise ValueError(f"{key}={dict(given)}: the run has no sources to weigh; use data.mixture")
    weights = {name: _stage_weight(sources, str(name), entry, key) for name, entry in given.items()}
    weights = {name: weight for name, weight in weights.items() if weight.weight}
    if not weights:
        raise ValueError(
            f"{key}: all weights are 0, so the stage has nothing to train on; use {key}="
            f"{{{next(iter(given))}: 1}}"
        )
    return weights


def _stage_weight(sources: Mapping[str, SourceSettings], name: str, entry: Any, key: str) -> SourceWeight:
    if name not in sources:
        raise ValueError(
            f"{key}.{name}: data.mixture has no such source; use one of {', '.join(sources)}, or add it there"
        )
    if isinstance(entry, Mapping):
        buckets = _buckets(f"{key}.{name}", cast(Mapping[str, Any], entry))
        return SourceWeight(weight=sum(buckets.values()), buckets=buckets)
    return SourceWeight(weight=_weight(f"{key}.{name}", entry), buckets=sources[name].buckets)


def _buckets(key: str, entry: Any) -> dict[str, float]:
    """Read weights of buckets; those that are 0 are left out."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key}={entry}: must be weights of buckets; use {key}={{{BUCKETS[-1]}: 1}}")
    given = cast(Mapping[str, Any], entry)
    for name in given:
        if name not in BUCKETS:
            raise ValueError(f"{key}.{name}: there is no such bucket; use one of {', '.join(BUCKETS)}")
    found = {name: _weight(f"{key}.{name}", given[name]) for name in BUCKETS if name in given}
    if found and not any(found.values()):
        raise ValueError(f"{key}: all weights are 0; use {key}={{{next(iter(found))}: 1}}, or none at all")
    return {name: weight for name, weight in found.items() if weight}


def _weight(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value}: must be a number, such as 0.5")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{key}={value}: must be a finite number and not negative, such as 0.5")
    return float(value)
