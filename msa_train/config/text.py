"""Text that comes from files and names, made fit for a terminal. The one place that knows what is not."""

import re

# C0, C1 and DEL; marks that turn the direction of writing around; line and paragraph separators; halves of
# pairs, as names of files that are not UTF-8 have them
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# of a word; nobody reads a value that fills the screen
_LONGEST_WORD, _SHOWN = 1000, 100


def printable(text: object, *, keep: str = "") -> str:
    r"""Escape what a terminal would act on or hide: no name can move the cursor or fake a line.

    Args:
        text: anything; its str().
        keep: characters that stay as they are, e.g. "\n\t" in a traceback.

    Example: "a\x1b[2Jb\n" -> "a\\x1b[2Jb\\n".
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def one_line(text: object) -> str:
    """Join the lines of a message by spaces, and escape the rest: for `name: error: ...`.

    Words that fill a screen lose their middle, so that the rule and the fix behind them are seen.
    """
    return printable(" ".join(_shortened(word) for word in str(text).split()))


def _shortened(word: str) -> str:
    if len(word) <= _LONGEST_WORD:
        return word
    return f"{word[:_SHOWN]}...({len(word):,} characters)...{word[-_SHOWN:]}"


def excerpt(text: object, limit: int = 160) -> str:
    """A text of somebody else's for a message: `one_line`, of limited length."""
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
