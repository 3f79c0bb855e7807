"""Tokenizers: plain bytes, or a `tokenizer.json`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig

# The first one that a tokenizer has is taken. The last but one is DeepSeek's, whose bars are not ASCII.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "[e~[",
    "<end_of_sentence>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Text to token ids.

    Attributes:
        vocab_size: rows that the embedding needs: the largest id + 1.
        eod_id: the token that ends every document.
        fingerprint: changes when any token id can change.
        needs_utf8: whether text must be valid UTF-8.
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
        """Token ids of one text, without end of document."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Token ids of many texts; may use several cores."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes themselves, 256 ends a document."""

    vocab_size = 257
    eod_id = 256
    fingerprint = "bytes-1"
    needs_utf8 = False

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """One id per byte."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """One id per byte of each text."""
        return [self.encode(text) for text in texts]


class JsonTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Special tokens that its post-processor would add are left out; documents end with `eod_id` instead.
    Truncation and padding that the file asks for are switched off: they would drop text without a word.

    Raises:
        ValueError: if the file is missing or unreadable, or has no token that can end a document.
    """

    needs_utf8 = True

    def __init__(self, path: str) -> None:
        # Imported here because the launcher and byte-level runs have no use for it.
        from tokenizers import Tokenizer as LibraryTokenizer

        file = Path(path).expanduser()
        try:
            content = file.read_bytes()
            tokenizer: Any = LibraryTokenizer.from_buffer(content)
        except OSError as error:
            raise ValueError(
                f"data.tokenizer={path}: cannot be read ({error.strerror}); "
                "give the path of a tokenizer.json, or 'bytes'"
            ) from error
        except Exception as error:  # the library raises nothing narrower
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"data.tokenizer={path}: is not a tokenizer.json of the tokenizers library ({reason}); "
                "save it again with Tokenizer.save()"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eod_id = _find_end_of_document(path, vocab)
        self.fingerprint = f"json-1-{hashlib.sha256(content).hexdigest()}"
        self._tokenizer = tokenizer

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Token ids of one UTF-8 text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Token ids of UTF-8 texts, on all cores (threads of the library)."""
        decoded = [text.decode("utf-8") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        ValueError: if it cannot be used.
    """
    return ByteTokenizer() if data.tokenizer == "bytes" else JsonTokenizer(data.tokenizer)


def _find_end_of_document(path: str, vocab: dict[str, int]) -> int:
    for name in END_OF_DOCUMENT_NAMES:
        if name in vocab:
            return vocab[name]
    names = ", ".join(name for name in END_OF_DOCUMENT_NAMES if name.isascii())
    raise ValueError(
        f"data.tokenizer={path}: has no token that ends a document; add one of {names} to the tokenizer"
    )
