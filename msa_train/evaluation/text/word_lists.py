"""Find words: those of wonderwords and english-words where installed, else words built from syllables."""

import importlib.metadata
import importlib.util
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from msa_train.evaluation.text.listed import listed

HINT = "pip install 'msa-train[eval]'"

_ADJECTIVES = listed(
    "amber ancient bitter blue bold brave brief bright broad bronze calm clear clever cold coral "
    "crisp curious damp dark deep dry dusty eager early empty faint fair fierce firm fleet fresh "
    "frosty gentle giant golden grand green grey happy hardy hasty heavy hidden hollow humble icy "
    "idle ivory jolly keen kind large late lean light little lively lone loud loyal lucky mellow mild "
    "misty modest narrow neat noble odd old open pale patient plain polite proud quick quiet rapid "
    "rare red ripe rough round royal rusty salty sharp short shy silent silver simple slim slow small "
    "smooth soft solid spare steady stern still stout strict sunny sweet swift tall tame tender thin "
    "tidy tiny tough vast warm wary white wide wild wise witty young zesty"
)
_NOUNS = listed(
    "acorn anchor anvil apple arrow badge bamboo banner barn basin basket beacon bell bench berry "
    "bishop blade blanket boat bottle bridge broom bucket button cabin candle canoe canvas castle "
    "cellar chain chapel cherry circle clock cloud coat comet copper cottage cradle crane creek crown "
    "curtain daisy desk dome donkey door drum eagle easel ember engine falcon feather fence ferry "
    "fiddle field finger flag flute forest fountain fox garden gate glove goat goose grape hammer "
    "harbor harp hedge helmet heron hill hinge horn island ivy jacket jar jewel kettle kite knot "
    "ladder lagoon lamp lantern leaf ledger lemon lever lily lion lizard loom maple market mason "
    "meadow mill mirror monk moose mountain needle nest oak oar olive orchard otter owl palace parrot "
    "path pearl pebble pencil piano pigeon pillow pine pipe planet plum pond poplar quarry quilt "
    "rabbit raft raven reed ribbon river robin rope rose saddle sail salmon sand shell shield shore "
    "spade sparrow spoon spruce stable star stone stove swan table temple thistle thorn thread tiger "
    "torch tower trail trout tulip tunnel turtle umbrella valley vase velvet village violin wagon "
    "walnut well whale wheel willow window wolf wood wren yarn zebra"
)
_ONSETS = listed("b bl br c ch cl d dr f fl g gl gr h j k l m n p pl pr qu r s sh sl sp st t th tr v w y z")
_NUCLEI, _CODAS = listed("a e i o u ai ea oo"), ("", "l", "m", "n", "r", "st", "nd", "sk")


@dataclass(frozen=True, slots=True)
class WordLists:
    """Hold words of three kinds, each distinct and sorted, so that a seed draws the same ones anywhere."""

    adjectives: tuple[str, ...]
    "for keys"
    nouns: tuple[str, ...]
    "for keys"
    common: tuple[str, ...]
    "for lists of words, as many as there are for a context of some 150K tokens"
    more: tuple[str, ...]
    "for longer lists, which take all of their words from here"
    name: str
    "which lists they are, with versions"
    hint: str
    "one line about what is not installed; empty where all is"


@cache
def load_word_lists() -> WordLists:
    """Load the lists: wonderwords' 8,166 words (of RULER) and web2's 234,450, else some that are built.

    Example of built ones: "dostra", "hoomund"; there are 7.5 million and the first 262,144 are taken.
    """
    found: list[str] = []
    missing: list[str] = []
    adjectives, nouns, common = _wonderwords()
    (found if common else missing).append("wonderwords")
    if not common:
        adjectives, nouns = list(_ADJECTIVES), list(_NOUNS)
        common = sorted({*_ADJECTIVES, *_NOUNS, *_built(8_192)})
    more = _web2()
    (found if more else missing).append("english-words")
    if not more:
        more = _built(1 << 18)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in found]
    hint = f"evaluation: {' and '.join(missing)} not installed, words are built from syllables ({HINT})"
    return WordLists(
        adjectives=tuple(sorted(set(adjectives))),
        nouns=tuple(sorted(set(nouns))),
        common=tuple(common),
        more=tuple(more),
        name=", ".join([*versions, *(["built"] if missing else [])]),
        hint=hint if missing else "",
    )


def _wonderwords() -> tuple[list[str], list[str], list[str]]:
    """Read the lists as text; three empty ones where the package is not installed."""
    # read as files: the package's own classes draw words by themselves
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or spec.origin is None:
        return [], [], []
    lists: list[list[str]] = []
    for kind in ("adjective", "noun", "verb"):
        text = (Path(spec.origin).parent / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
        lists.append([word.strip() for word in text.splitlines() if word.strip()])
    adjectives, nouns, verbs = lists
    return adjectives, nouns, sorted({*adjectives, *nouns, *verbs})


def _web2() -> list[str]:
    """Read the English word list; an empty one where the package is not installed."""
    try:
        from english_words import get_english_words_set
    except ImportError:
        return []
    return sorted(get_english_words_set(["web2"], alpha=True, lower=True))


def _built(count: int) -> list[str]:
    """Build words of two syllables in a fixed mixed order."""
    syllables = [a + b + c for a, b, c in itertools.product(_ONSETS, _NUCLEI, _CODAS)]
    size = len(syllables) ** 2
    # a step without a common divisor with the size meets every pair once, neighbours being unlike
    step = 1_000_003
    pairs = (divmod(i * step % size, len(syllables)) for i in range(2 * count))
    words = dict.fromkeys(syllables[a] + syllables[b] for a, b in pairs)
    return sorted(itertools.islice(words, count))
