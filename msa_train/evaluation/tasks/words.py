"""Ask for the words that come most often: in a numbered list, and among made-up words.

Structure of RULER's cwe: 10 words 30 times, all others 3 times, after a worked example of 40 words (10 and 3
times). Below 4,096 tokens 6 times and once, after an example of 20 words, 3 times and once. fwe: words of 6
letters by rank, rank k int(n * k^-2 / zeta(2)) times; rank 1 is written as dots, ranks 2 to 4 are asked for.
"""

import math
import random
import string
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, chain

from msa_train.evaluation.tasks.sample import Draft, Draw, TooShortError

_ASKED, _SHORT = 10, 4096
_DOTS, _ZETA_2 = "...", math.pi**2 / 6


@dataclass(frozen=True, slots=True)
class CommonWordsTask:
    """Write a numbered list of words."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; the answer is the 10 words, in any order."""
        # a tokenizer of bytes has no room for the longer setting far above 4,096 tokens either
        settings = [((6, 1), (20, 3, 1))]
        if draw.length >= _SHORT:
            settings.insert(0, ((30, 3), (40, 10, 3)))
        state = draw.rng.getstate()
        for number, (counts, example) in enumerate(settings):
            draw.rng.setstate(state)
            try:
                return self._write(draw, *counts, self._example(draw, *example))
            except TooShortError:
                if number == len(settings) - 1:
                    raise
        raise AssertionError("the last setting returns or raises")

    def _write(self, draw: Draw, common: int, rare: int, example: str) -> Draft:
        """Write a draft in which words come `common` and `rare` times."""
        before, after, prefix = draw.material.wording.common.parts()
        lists = draw.material.words
        words, asked, count = [], [], 0
        for source in (lists.common, lists.more):
            words = draw.rng.sample(source, min(len(source), max(2 * _ASKED, draw.length // (3 * rare))))
            asked = words[:_ASKED]
            left = draw.left([example, before, after], prefix, asked)
            count = _num_words(draw, words, left, common, rare)
            # where the shorter list is used up, all words are of the longer one
            if count < len(words):
                break
        entries = asked * common + words[_ASKED:count] * rare
        draw.rng.shuffle(entries)
        return Draft([example, before, *_numbered(entries), after], prefix, asked, ordered=False)

    def _example(self, draw: Draw, num_words: int, common: int, rare: int) -> str:
        words = draw.rng.sample(draw.material.words.common, num_words)
        entries = words[:_ASKED] * common + words[_ASKED:] * rare
        draw.rng.shuffle(entries)
        before, after, prefix = draw.material.wording.common.parts()
        return f"{before}{''.join(_numbered(entries))}{after}{prefix} {', '.join(words[:_ASKED])}\n\n"


def _numbered(entries: list[str]) -> list[str]:
    """Number words: ["ox", "ant"] -> ["1. ox", " 2. ant"]."""
    return [f"{' ' if i else ''}{i + 1}. {word}" for i, word in enumerate(entries)]


def _num_words(draw: Draw, words: list[str], left: int, common: int, rare: int) -> int:
    """Return how many of the words fit, the ten common ones included, from counts of words and numbers."""
    costs = draw.counts.of([f" {word}" for word in words])
    most = _ASKED * common + (len(words) - _ASKED) * rare
    numbers = [0, *accumulate(draw.counts.of([f" {i + 1}." for i in range(most)]))]
    first = common * sum(costs[:_ASKED])
    taken = accumulate(costs[_ASKED:], lambda total, cost: total + rare * cost, initial=first)
    totals = [words_cost + numbers[_ASKED * common + rare * i] for i, words_cost in enumerate(taken)]
    extra = bisect_right(totals, left) - 1
    if extra < 1:
        needed = draw.length - left + totals[min(1, len(totals) - 1)]
        raise TooShortError(f"needs at least {needed} tokens with this tokenizer")
    return _ASKED + extra


@dataclass(frozen=True, slots=True)
class FrequentWordsTask:
    """Write made-up words, the more often the lower their rank."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; the answer is the words of ranks 2, 3 and 4."""
        words = coded_words(draw.rng, max(draw.length // 50, 8))
        before, after, prefix = draw.material.wording.frequent.parts()
        left = draw.left([before, after], prefix, words[1:4])
        costs = draw.counts.of([f" {word}" for word in words])
        low, high = 0, left
        while low < high:
            middle = (low + high + 1) // 2
            counts = rank_counts(middle, len(words))
            fits = sum(a * b for a, b in zip(costs, counts, strict=True)) <= left
            low, high = (middle, high) if fits else (low, middle - 1)
        counts = rank_counts(low, len(words))
        if not counts[1] > counts[2] > counts[3] > counts[4]:
            raise TooShortError("has too few words to tell the ranks apart; ask for a longer context")
        text = list(chain.from_iterable([word] * n for word, n in zip(words, counts, strict=True)))
        draw.rng.shuffle(text)
        return Draft([before, *(f" {word}" for word in text), after], prefix, words[1:4], ordered=False)


def rank_counts(num_words: int, num_ranks: int) -> list[int]:
    """Count the words of each rank k: int(n * k^-2 / zeta(2)). Example: 100, 5 -> [60, 15, 6, 3, 2]."""
    return [int(num_words * k**-2 / _ZETA_2) for k in range(1, num_ranks + 1)]


def coded_words(rng: random.Random, count: int) -> list[str]:
    """Draw distinct words of 6 letters; the first one is dots."""
    words: dict[str, None] = {_DOTS: None}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
