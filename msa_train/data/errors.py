"""Word the one line that reports a bad corpus."""


def corpus_error(corpus: str, problem: str) -> ValueError:
    """Say what is wrong with data.corpus; what is no text in a file's name is spelled out."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"data.corpus={corpus}: {problem}")
    return ValueError(shown)


def unreadable(corpus: str, place: str, error: Exception) -> ValueError:
    """Report a file or folder which the system, or a decompressor, cannot read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return corpus_error(corpus, f"{place} cannot be read ({reason}); repair it or leave it out")
