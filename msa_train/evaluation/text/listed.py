"""Write lists of words as one text."""


def listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    """Split a text: listed("a b") -> ("a", "b"); listed("a b, c", ", ") -> ("a b", "c")."""
    return tuple(text.split(separator))
