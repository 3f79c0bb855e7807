"""Check text values: refuse what could not be stored, printed or handed to a shell as it stands."""

import unicodedata
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import cast

MAX_BYTES = 2048
"half of what Linux takes for a path: files in a folder have names too"
MAX_NAME_BYTES = 255
"of a file or folder"
_PATHS = {"name", "run_dir", "data.corpus", "data.tokenizer", "data.cache_dir", "checkpoint.load"}
# Control characters, the separators of lines and paragraphs, halves of pairs: bytes that are not UTF-8
_UNFIT_CATEGORIES = {"Cc", "Zl", "Zp", "Cs"}
# They make a terminal show something else than what is stored.
_TURNS_WRITING = {*"\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def check_text(name: str, value: str) -> None:
    """Check one text value.

    Raises:
        ValueError: where it holds a character that no name or path needs, or is longer than any path.
    """
    for character in value:
        if unicodedata.category(character) in _UNFIT_CATEGORIES or character in _TURNS_WRITING:
            shown = value if len(value) <= 80 else f"{value[:77]}..."
            raise ValueError(
                f"{name}={ascii(shown)[1:-1]}: must hold no control characters, line ends or bytes that are "
                f"not UTF-8, and has {_named(character)}; leave it out"
            )
    if len(value.encode("utf-8")) > MAX_BYTES:
        raise ValueError(f"{name}={value[:40]}...: must be at most {MAX_BYTES} bytes long; use a shorter one")
    longest = max(len(part.encode("utf-8")) for part in value.split("/"))
    if name in _PATHS and longest > MAX_NAME_BYTES:
        raise ValueError(
            f"{name}={value[:40]}...: no file or folder has a name of {longest} bytes; use a shorter one"
        )


def check_texts(config: object) -> None:
    """Check all text values of a configuration of a run, lists and mappings included.

    A `${` is refused too: the file that workers read would be taken for a reference to another key.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for name, value in texts(config):
        check_text(name, value)
        if "${" in value:
            raise ValueError(
                f"{name}={value}: must not contain ${{ once it is put together; write a name without it"
            )


def texts(config: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text value with its dotted key, e.g. ("model.name", "tiny")."""
    if isinstance(config, str):
        yield prefix.removesuffix("."), config
    elif is_dataclass(config):
        for item in fields(config):
            yield from texts(getattr(config, item.name), f"{prefix}{item.name}.")
    elif isinstance(config, dict):
        for key, value in cast(dict[str, object], config).items():
            yield from texts(value, f"{prefix}{key}.")
    elif isinstance(config, list):
        for index, value in enumerate(cast(list[object], config)):
            yield from texts(value, f"{prefix}{index}.")


def _named(character: str) -> str:
    return unicodedata.name(character, f"U+{ord(character):04X}")
