"""The smallest tokenizer.json."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers


def byte_tokenizer_json(folder: Path) -> Path:
    """A tokenizer of one id per byte, which are not the bytes' own."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer: Any = Tokenizer(models.BPE(vocab={**vocab, "<|endoftext|>": len(vocab)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = folder / "byte_tokenizer.json"
    tokenizer.save(str(path))
    return path
