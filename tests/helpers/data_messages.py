"""What is said about data settings that cannot be used."""

from pathlib import Path

import pytest

from msa_train.config import DataConfig
from msa_train.data import prepare_corpus


def refusal(tmp_path: Path, path: object, **settings: object) -> str:
    """The one line, after a look at its form; tmp_path: for the cache."""
    data = DataConfig(corpus=str(path), cache_dir=str(tmp_path / "cache"), **settings)  # pyright: ignore
    with pytest.raises(ValueError) as caught:
        prepare_corpus(data, vocab_size=257)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.")
    assert "=" in message
    assert ";" in message, "says what to do"
    return message
