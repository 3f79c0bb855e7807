"""Tokenize text by plain bytes, or by a `tokenizer.json` (json_tokenizer.py)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig


class Tokenizer(Protocol):
    """Turn text into token ids.

    Attributes:
        vocab_size: rows that the embedding needs: the largest id + 1.
        eod_id: the token that ends every document.
        fingerprint: changes when any token id can change.
        needs_utf8: text must be valid UTF-8.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def needs_utf8(self) -> bool: ...

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the token ids of one text, [num_tokens] int32, without end of document."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of many texts; may use several cores."""
        ...

    def findings(self) -> list[str]:
        """List what was lost or met in all texts so far, a line each.

        Raises:
            ValueError: if so much was lost that the tokens do not stand for the text.
        """
        ...


class ByteTokenizer:
    """Tokenize by bytes: ids 0 to 255 are the bytes themselves, 256 ends a document; "ab" -> [97, 98]."""

    vocab_size = 257
    eod_id = 256
    fingerprint = "bytes-1"
    needs_utf8 = False

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return one id per byte."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Return one id per byte of each text."""
        return [self.encode(text) for text in texts]

    def findings(self) -> list[str]:
        """Return no lines: nothing can be lost."""
        return []


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """Build the tokenizer that `data.tokenizer` names.

    Raises:
        ValueError: if it cannot be used.
    """
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    # the launcher and byte-level runs have no use for the library
    from msa_train.data.tokenizers.json_tokenizer import JsonTokenizer

    return JsonTokenizer(data.tokenizer, special_tokens=data.special_tokens, max_unknown=data.max_unknown)
