"""Build one sample of a task: its text in pieces, sized by arithmetic, confirmed by one tokenization.

A task writes a `Draft`: pieces of text whose tokens add up where each piece ends a line or begins with a
space. So the haystack is filled by adding counts, and the whole text is tokenized once to confirm it. Where
the sum was wrong, because the tokenizer joined letters over an edge, the draft is made again a bit smaller.

Cost of a sample of 1M tokens, measured with a BPE of 8,000 words on one core: 4.7 s (niah_single_2) and 8.1 s
(cwe) of processor time, about half of it for the tokenization that confirms; memory 8 bytes per token.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from msa_train.data.tokenizers.tokenizer import Tokenizer
from msa_train.evaluation.text.material import Material

# a draft shrinks by what it was too long; two tries do, more would be a tokenizer without any additivity
_TRIES = 6
# pieces whose counts are remembered: sentences of a haystack come again in other samples
_MAX_REMEMBERED = 1 << 18


@dataclass(frozen=True, slots=True)
class Needle:
    """Hold where a piece of text that the answer depends on lies."""

    start: int
    "first token"
    stop: int
    "token behind the last one"
    answer: int
    "number of the reference that it is needed for, from 0"


@dataclass(kw_only=True, slots=True)
class Sample:
    """Hold one question with its answers, as text and as tokens."""

    task: str
    "name in the registry"
    length: int
    "tokens that it was made for; it has at most so many"
    index: int
    "number among the samples of its task and length"
    prompt: str
    "everything before the prefix"
    prefix: str
    "beginning of the answer, which the model is given"
    references: tuple[str, ...]
    "answers in the order in which they are written behind the prefix"
    tokens: npt.NDArray[np.int64]
    "[n] int64: prompt, prefix, references"
    answers: tuple[tuple[int, int], ...]
    "tokens of each reference, from the first to behind the last"
    needles: tuple[Needle, ...]
    "what must be found"
    depth: float | None
    "share of the context before the needle, 0 to 1; None where there is more than one place"
    ordered: bool
    "there is one right order of the references, so that a hit means something"

    @property
    def text(self) -> str:
        """Return the whole sample as a document, e.g. to train on others like it."""
        return self.prompt + self.prefix + reference_text(self.references)


@dataclass(slots=True)
class Draft:
    """Hold a sample as text, before it is tokenized."""

    pieces: list[str]
    "of the prompt"
    prefix: str
    "beginning of the answer"
    references: list[str]
    "answers in the order of the answer"
    needles: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    "(piece, reference that needs it)"
    depth: float | None = None
    "see Sample"
    ordered: bool = True
    "see Sample"


class TooShortError(ValueError):
    """Say that not even the smallest sample of a task fits a length."""


class TokenCounts:
    """Count tokens of pieces of text, each once.

    Example: with bytes, of(["ab\\n", "c\\n"]) -> [3, 2].
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def of(self, pieces: Sequence[str]) -> list[int]:
        """Return the tokens of each piece."""
        new = list(dict.fromkeys(piece for piece in pieces if piece not in self._known))
        if len(self._known) + len(new) > _MAX_REMEMBERED:
            self._known.clear()
            new = list(dict.fromkeys(pieces))
        encoded = self.tokenizer.encode_batch([piece.encode() for piece in new]) if new else []
        self._known.update((piece, len(ids)) for piece, ids in zip(new, encoded, strict=True))
        return [self._known[piece] for piece in pieces]

    def total(self, pieces: Sequence[str]) -> int:
        """Return the tokens of all pieces together."""
        return sum(self.of(pieces))


@dataclass(slots=True)
class Draw:
    """Hold what a task writes a draft from."""

    rng: random.Random
    "of this sample alone: no order is shared between samples"
    length: int
    "tokens that the draft may have, with prefix and references"
    index: int
    "number of the sample"
    depth: float
    "where a single needle goes, 0 to 1"
    counts: TokenCounts
    "of the tokenizer"
    material: Material
    "words, sentences, wording"

    def left(self, fixed: Sequence[str], prefix: str, references: Sequence[str]) -> int:
        """Return the tokens left for the haystack beside the fixed pieces and the answer.

        Raises:
            TooShortError: if there are none.
        """
        needed = self.counts.total([*fixed, prefix, *reference_pieces(references)])
        if needed >= self.length:
            raise TooShortError(f"needs at least {needed + 1} tokens with this tokenizer")
        return self.length - needed

    def fill(self, units: Callable[[int], str], left: int, *, least: int = 1) -> list[str]:
        """Take as many units, from number 0 on, as `left` tokens hold.

        Example: with bytes, units "a\\n", "bb\\n", "ccc\\n", left 6 -> ["a\\n", "bb\\n"].

        Raises:
            TooShortError: if there is no room for `least` of them.
        """
        taken: list[str] = []
        size = 16
        while True:
            more = [units(len(taken) + i) for i in range(size)]
            for unit, count in zip(more, self.counts.of(more), strict=True):
                if count > left:
                    if len(taken) < least:
                        lacking = count * (least - len(taken)) - left
                        raise TooShortError(f"needs some {self.length + lacking} tokens with this tokenizer")
                    return taken
                left -= count
                taken.append(unit)
            size = min(2 * size, 4096)


def reference_pieces(references: Sequence[str]) -> list[str]:
    """Write references as they follow the prefix: ["a", "b"] -> [" a", ", b"]."""
    return [f"{', ' if i else ' '}{text}" for i, text in enumerate(references)]


def reference_text(references: Sequence[str]) -> str:
    """Join references as they follow the prefix: ["a", "b"] -> " a, b"."""
    return "".join(reference_pieces(references))


def build_sample(
    task: str,
    write: Callable[[Draw], Draft],
    *,
    seed: int | str,
    index: int,
    length: int,
    depth: float,
    counts: TokenCounts,
    material: Material,
) -> Sample:
    """Build a sample that fits a length; the same on every machine for the same arguments.

    Args:
        task: its name.
        write: of the task.
        seed: of the evaluation, a number; documents for training have a text.
        index: number of the sample.
        length: tokens that it may have.
        depth: where a single needle goes.
        counts: of the tokenizer.
        material: words, sentences, wording.

    Raises:
        TooShortError: if not even the smallest fits.
    """
    spare = 0
    for _ in range(_TRIES):
        draw = Draw(
            # text seeds are hashed by SHA-512, the same in all versions of Python
            rng=random.Random(f"{seed}/{task}/{length}/{index}"),
            length=length - spare,
            index=index,
            depth=depth,
            counts=counts,
            material=material,
        )
        draft = write(draw)
        sample = _tokenize(draft, task, index, length, counts)
        excess = len(sample.tokens) - length
        if excess <= 0:
            return sample
        spare += excess + 1
    raise TooShortError("could not be made to fit: the tokens of its parts do not add up")


def _tokenize(draft: Draft, task: str, index: int, length: int, counts: TokenCounts) -> Sample:
    """Tokenize a draft and find its needles and answers among the tokens."""
    prompt = "".join(draft.pieces)
    given = _encode(counts.tokenizer, prompt + draft.prefix)
    answers, parts = [], [given]
    place = len(given)
    for piece in reference_pieces(draft.references):
        parts.append(_encode(counts.tokenizer, piece))
        answers.append((place, place + len(parts[-1])))
        place = answers[-1][1]
    return Sample(
        task=task,
        length=length,
        index=index,
        prompt=prompt,
        prefix=draft.prefix,
        references=tuple(draft.references),
        tokens=np.concatenate(parts),
        answers=tuple(answers),
        needles=_find_needles(draft, given, counts),
        depth=draft.depth,
        ordered=draft.ordered,
    )


def _find_needles(draft: Draft, given: npt.NDArray[np.int64], counts: TokenCounts) -> tuple[Needle, ...]:
    """Find each needle: by adding counts and, where the tokens there are others, by counting up to it."""
    edges = np.concatenate([[0], np.cumsum(counts.of(draft.pieces))]).tolist()
    found: list[Needle] = []
    for piece, answer in draft.needles:
        text = draft.pieces[piece]
        start, stop = edges[piece], edges[piece + 1]
        if not np.array_equal(given[start:stop], _encode(counts.tokenizer, text)):
            # a token over the edge belongs to the needle
            before = "".join(draft.pieces[:piece])
            start = min(len(_encode(counts.tokenizer, before)), len(given) - 1)
            stop = max(len(_encode(counts.tokenizer, before + text)), start + 1)
        found.append(Needle(start, stop, answer))
    return tuple(found)


def _encode(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int64]:
    return tokenizer.encode(text.encode()).astype(np.int64)
