"""Read a `tokenizer.json` by the tokenizers library, so that tokens stand for the text and nothing else.

The file may come from anywhere, and may ask for things that lose text without a word: truncation, characters
that it has no tokens for, words in the text that are taken for the end of a document.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from msa_train.config.text import excerpt
from msa_train.data.tokenizers.time_limit import within
from msa_train.runtime.untrusted_files import parse_json, read_limited

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


_MAX_BYTES = 2**29
# Regular expressions of the file may try without end; true tokenizers do a megabyte per second and more
_LIMIT_S, _SLOWEST_BYTES_PER_S = 120.0, 10_000
_NAMED = 3


@dataclass(slots=True)
class _Counts:
    """Count tokens and characters of all texts so far."""

    tokens: int = 0
    "in all"
    unknown: int = 0
    "tokens that are the unknown one"
    characters: int = 0
    "characters that are no spaces"
    lost: int = 0
    "characters that no token covers"


class JsonTokenizer:
    """Tokenize by a tokenizer.json.

    Special tokens that its post-processor would add are left out; documents end with `eod_id` instead, which
    no text gives without special_tokens. Truncation, padding and dropout of the file are switched off.

    Args:
        path: of the file.
        special_tokens: take special tokens that are written in a text for what they name; False: for text.
        max_unknown: largest share of tokens that are unknown, or of characters that are lost.

    Raises:
        ValueError: if the file is missing or unreadable, or has no token that can end a document.
    """

    needs_utf8 = True

    def __init__(self, path: str, *, special_tokens: bool = False, max_unknown: float = 0.01) -> None:
        from tokenizers import Tokenizer as LibraryTokenizer

        self._path, self._max_unknown, self._counts = path, max_unknown, _Counts()
        content, settings = _read(path)
        end = _find_end_of_document(path, settings)
        try:
            tokenizer: Any = LibraryTokenizer.from_str(json.dumps(settings))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = not special_tokens
            vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        except BaseException as error:
            raise self._unreadable(error) from error
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eod_id = vocab[end]
        # of the file's bytes, and of the one setting that changes tokens; 2 counts changes of this code
        self.fingerprint = f"json-2-{special_tokens:d}-{hashlib.sha256(content).hexdigest()}"
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._end = end
        self._unknown_id = _unknown_id(settings, vocab)
        # then nothing needs to be counted, and the library's faster call can be used
        self._loses_nothing = _has_all_bytes(settings, vocab)
        special = [one["content"] for one in _added(settings) if one.get("special")]
        # longest first: of two that begin alike, the text has the longer one
        special = sorted({text.encode() for text in special if text}, key=len, reverse=True)
        self._special_pattern = re.compile(b"|".join(map(re.escape, special)) or rb"(?!)")
        self._met: dict[bytes, int] = {}

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the token ids of one UTF-8 text, [num_tokens] int32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of UTF-8 texts, on all cores (threads of the library).

        Raises:
            ValueError: if the library cannot encode one of them.
        """
        decoded = [text.decode("utf-8") for text in texts]
        # without places of the tokens it is faster; they are needed to see what was left out
        encode = self._tokenizer.encode_batch_fast if self._loses_nothing else self._tokenizer.encode_batch
        encodings = self._limited(encode, decoded)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        if not self._special_tokens:
            for i, tokens in enumerate(ids):
                # written in the text, the end of a document would cut it in two
                if (tokens == self.eod_id).any():
                    ids[i] = self._in_parts(decoded[i])
        for text in texts:
            for found in self._special_pattern.findall(text):
                self._met[found] = self._met.get(found, 0) + 1
        self._counts.tokens += sum(map(len, ids))
        if not self._loses_nothing:
            for text, encoding, tokens in zip(decoded, encodings, ids, strict=True):
                self._count(text, encoding.offsets, tokens)
        return ids

    def findings(self) -> list[str]:
        """See Tokenizer."""
        counts, lines = self._counts, []
        for what, count, total in (
            ("tokens are the unknown one", counts.unknown, counts.tokens),
            ("characters have no token and are lost", counts.lost, counts.characters),
        ):
            # an error above the allowed share, a line in the log below it
            if count > self._max_unknown * total:
                raise ValueError(
                    f"data.tokenizer={self._path}: {count:,} of {total:,} {what}, {count / total:.1%} where "
                    f"data.max_unknown={self._max_unknown:g} are allowed; use a tokenizer for this text, "
                    "data.tokenizer=bytes, or a larger data.max_unknown"
                )
            if count:
                lines.append(
                    f"data.tokenizer={self._path}: {count:,} of {total:,} {what} ({count / total:.2%})"
                )
        if self._met:
            most = sorted(self._met.items(), key=lambda item: -item[1])[:_NAMED]
            named = ", ".join(f"{excerpt(text.decode(errors='replace'), 40)} ({n:,})" for text, n in most)
            lines.append(
                f"data.tokenizer={self._path}: {sum(self._met.values()):,} special tokens are written in the "
                f"text, most often {named}; they are taken for "
                + ("what they name (data.special_tokens=true)" if self._special_tokens else "text")
            )
        return lines

    def _limited(self, encode: Any, texts: list[str]) -> Any:
        """Have the library encode texts, in a time that suits them."""
        limit_s = _LIMIT_S + sum(map(len, texts)) / _SLOWEST_BYTES_PER_S
        try:
            return within(limit_s, lambda: encode(texts, add_special_tokens=False))
        except TimeoutError as error:
            raise ValueError(
                f"data.tokenizer={self._path}: has not encoded {sum(map(len, texts)):,} characters of the "
                f"corpus within {limit_s:.0f} s, as with regular expressions that try without end; use "
                "another tokenizer"
            ) from error
        except BaseException as error:
            raise self._cannot_encode(error) from error

    def _in_parts(self, text: str) -> npt.NDArray[np.int32]:
        """Tokenize a text in which a word is the end of a document: it is cut behind its first letter.

        Only vocabularies that have the end as a word of their own need this, besides as an added token.
        Example: "a</s>b" with the end </s> is tokenized as "a<" and "/s>b".
        """
        first, rest = self._end[:1], self._end[1:]
        pieces = text.split(self._end)
        parts = [rest * (i > 0) + piece + first * (i + 1 < len(pieces)) for i, piece in enumerate(pieces)]
        encodings = self._limited(self._tokenizer.encode_batch_fast, [part for part in parts if part])
        tokens = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])
        if (tokens == self.eod_id).any():
            raise ValueError(
                f"data.tokenizer={self._path}: gives {self._end}, which ends documents, for other text; use "
                "another tokenizer, or data.special_tokens=true"
            )
        return tokens

    def _count(self, text: str, offsets: list[tuple[int, int]], tokens: npt.NDArray[np.int32]) -> None:
        """Count characters that no token covers, and unknown tokens; offsets: begin and end of each token."""
        visible = np.array([not letter.isspace() for letter in text], bool)
        # +1 where a token begins, -1 where it ends: the running sum is the number of tokens over a character
        edges = np.zeros(len(text) + 1, np.int64)
        places = np.array(offsets, np.int64).reshape(-1, 2)
        np.add.at(edges, places[:, 0], 1)
        np.add.at(edges, places[:, 1], -1)
        covered = np.cumsum(edges[:-1]) > 0
        self._counts.characters += int(visible.sum())
        self._counts.lost += int((visible & ~covered).sum())
        if self._unknown_id is not None:
            self._counts.unknown += int((tokens == self._unknown_id).sum())

    def _unreadable(self, error: BaseException) -> BaseException:
        return _as_value_error(
            error,
            f"data.tokenizer={self._path}: is not a tokenizer.json of the tokenizers library "
            f"({excerpt(str(error))}); save it again with Tokenizer.save()",
        )

    def _cannot_encode(self, error: BaseException) -> BaseException:
        return _as_value_error(
            error,
            f"data.tokenizer={self._path}: cannot encode the corpus ({excerpt(str(error))}); give it a "
            "token for what it does not know, or use another tokenizer",
        )


def _as_value_error(error: BaseException, message: str) -> BaseException:
    """Make a ValueError: the library raises nothing narrower than Exception, and a panic is not even that."""
    return error if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)) else ValueError(message)


def _read(path: str) -> tuple[bytes, dict[str, Any]]:
    """Read the file's bytes, and what they say, without dropout, which makes tokens a matter of chance."""
    try:
        content = read_limited(Path(path).expanduser(), _MAX_BYTES)
    except OSError as error:
        raise ValueError(
            f"data.tokenizer={path}: cannot be read ({error.strerror}); "
            "give the path of a tokenizer.json, or 'bytes'"
        ) from error
    try:
        settings = parse_json(content)
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
            raise ValueError("has no model")
        if not isinstance(settings["model"].get("vocab"), (dict, list)):
            raise ValueError("has no vocabulary")
    except ValueError as error:
        raise ValueError(
            f"data.tokenizer={path}: is not a tokenizer.json of the tokenizers library ({error}); "
            "save it again with Tokenizer.save()"
        ) from error
    if settings["model"].get("dropout"):
        settings["model"]["dropout"] = None
    return content, settings


def _added(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """List the added tokens, which are found in the text before all others; those of the right form."""
    added = settings.get("added_tokens")
    return [
        one
        for one in (added if isinstance(added, list) else [])
        if isinstance(one, dict) and isinstance(one.get("content"), str)
    ]


def _find_end_of_document(path: str, settings: dict[str, Any]) -> str:
    """Find the token that ends documents, and make it special: an entry that text can give is none."""
    # by our order of names, not the file's: the same tokenizer saved anew keeps its end
    added = {one["content"]: one for one in _added(settings)}
    for name in END_OF_DOCUMENT_NAMES:
        if name in added:
            added[name]["special"] = True
            return name
    vocab = settings["model"]["vocab"]
    words = (
        set(vocab)
        if isinstance(vocab, dict)
        else {str(one[0]) for one in vocab if isinstance(one, list) and one}
    )
    ordinary = next((name for name in END_OF_DOCUMENT_NAMES if name in words), None)
    if ordinary is not None:
        raise ValueError(
            f"data.tokenizer={path}: {ordinary} is an ordinary entry of its vocabulary, which text can give, "
            "and no other token ends a document; add it with Tokenizer.add_special_tokens()"
        )
    names = ", ".join(name for name in END_OF_DOCUMENT_NAMES if name.isascii())
    raise ValueError(
        f"data.tokenizer={path}: has no token that ends a document; add one of {names} to the tokenizer"
    )


def _unknown_id(settings: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Return the id of the token for what the vocabulary lacks, None where there is none."""
    model = settings["model"]
    given = (
        model.get("unk_id") if isinstance(model["vocab"], list) else vocab.get(model.get("unk_token") or "")
    )
    return given if isinstance(given, int) else None


def _has_all_bytes(settings: dict[str, Any], vocab: dict[str, int]) -> bool:
    """Tell if every byte has a token, so that no character is ever unknown."""
    from tokenizers import pre_tokenizers

    # two ways to have all bytes: 256 tokens <0x00> to <0xFF>, or 256 letters that stand for them
    if settings["model"].get("byte_fallback") is True:
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    steps = json.dumps([settings.get("normalizer"), settings.get("pre_tokenizer")])
    if '"ByteLevel"' not in steps or "merges" not in settings["model"]:
        return False
    return all(letter in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
