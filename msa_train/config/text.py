"""Text that comes from files and names, made fit for a terminal. The one place that knows what is not."""

import re

# C0, C1 and DEL; marks that turn the direction of writing around; line and paragraph separators; halves of
# pairs, as names of files that are not UTF-8 have them
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object, *, keep: str = "") -> str:
    r"""Escape what a terminal would act on or hide: no name can move the cursor or fake a line.

    Args:
        text: anything; its str().
        keep: characters that stay as they are, e.g. "\n\t" in a traceback.

    Example: "a\x1b[2Jb\n" -> "a\\x1b[2Jb\\n".
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def one_line(text: object) -> str:
    """Join the lines of a message by spaces, and escape the rest: for `name: error: ...`."""
    return printable(" ".join(str(text).split()))


def excerpt(text: object, limit: int = 160) -> str:
    """A text of somebody else's for a message: `one_line`, of limited length."""
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
