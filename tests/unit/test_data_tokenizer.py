"""Tokenizers, made here with the tokenizers library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from msa_train.config import DataConfig
from msa_train.data import load_datasets, prepare_corpus
from msa_train.data.store import TokenStore
from msa_train.data.tokenizer import ByteTokenizer, build_tokenizer

TEXT = "the cat sat on the mat; \u00fcber \u20ac. " * 5


def _tokenizer_json(tmp_path: Path, end: str | None = "<|endoftext|>") -> Path:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end] if end else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=1)
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _data(tmp_path: Path, corpus: Path, tokenizer: Path) -> DataConfig:
    return DataConfig(
        corpus=str(corpus), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache"), seq_len=64
    )


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"a\xff").tolist() == [97, 255]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)


def test_json_text_comes_back_whole(tmp_path: Path) -> None:
    path = _tokenizer_json(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} {TEXT}", encoding="utf-8")
    data = _data(tmp_path, tmp_path / "texts", path)
    tokenizer = build_tokenizer(data)
    assert tokenizer.eod_id == 0
    corpus = prepare_corpus(data, vocab_size=tokenizer.vocab_size)
    assert corpus.tokenizer_vocab_size == tokenizer.vocab_size
    store = TokenStore(corpus.prefix, corpus="texts")
    library: Any = Tokenizer.from_file(str(path))
    for i in range(4):
        tokens = store.read(int(store.begin[i]), int(store.lengths[i]))
        assert tokens[-1] == tokenizer.eod_id
        assert (tokens[:-1] != tokenizer.eod_id).all(), "no special token but the last"
        assert library.decode(tokens[:-1].tolist()) == f"{i} {TEXT}", "neither cut nor padded"


def test_bytes_per_token_is_that_of_the_held_out_documents(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text("the cat " * (i + 1) + "qzx" * i, encoding="utf-8")
    data = _data(tmp_path, tmp_path / "texts", _tokenizer_json(tmp_path))
    data.validation_fraction = 0.4
    _, validation, corpus = load_datasets(data, block_size=16, vocab_size=300)
    assert validation is not None
    num_labels = sum(validation[i].num_labels for i in range(validation.num_packs))
    tokens = np.concatenate([validation[i].tokens for i in range(validation.num_packs)])
    library: Any = Tokenizer.from_file(data.tokenizer)
    text = library.decode(tokens[tokens != 0].tolist())
    assert corpus.bytes_per_token == pytest.approx(len(text.encode()) / num_labels)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = _data(tmp_path, tmp_path / "a.txt", _tokenizer_json(tmp_path))
    first = prepare_corpus(data, vocab_size=300)
    _tokenizer_json(tmp_path, end="</s>")
    assert prepare_corpus(data, vocab_size=300).prefix != first.prefix


def _error(tmp_path: Path, tokenizer: Path, text: bytes = b"text", vocab_size: int = 300) -> str:
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        prepare_corpus(_data(tmp_path, tmp_path / "a.txt", tokenizer), vocab_size=vocab_size)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    return message


def test_missing_file(tmp_path: Path) -> None:
    message = _error(tmp_path, tmp_path / "none.json")
    assert message.startswith(f"data.tokenizer={tmp_path}/none.json: cannot be read (No such file")
    assert "is a directory" in _error(tmp_path, tmp_path).lower()


@pytest.mark.parametrize("content", [b"", b"{}", b"not json\n", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    assert "is not a tokenizer.json of the tokenizers library" in _error(tmp_path, tmp_path / "t.json")


def test_no_end_of_document(tmp_path: Path) -> None:
    message = _error(tmp_path, _tokenizer_json(tmp_path, end=None))
    assert "has no token that ends a document; add one of <|endoftext|>, " in message


def test_larger_than_the_vocabulary(tmp_path: Path) -> None:
    path = _tokenizer_json(tmp_path)
    size = build_tokenizer(_data(tmp_path, path, path)).vocab_size
    message = _error(tmp_path, path, vocab_size=size - 1)
    assert f"needs {size} rows, model.vocab_size={size - 1} is too small; use model.vocab_size=" in message


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    message = _error(tmp_path, _tokenizer_json(tmp_path), text=b"good \xff bad")
    assert "a.txt is not UTF-8 (byte 5); convert it to UTF-8 or use data.tokenizer=bytes" in message


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    data = _data(tmp_path, tmp_path / "a.txt", _tokenizer_json(tmp_path))
    corpus = prepare_corpus(data, vocab_size=300)
    assert corpus.num_bytes == len("the cat")


def test_byte_tokenizer_needs_257_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    data = DataConfig(corpus=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"data.tokenizer=bytes: needs 257 rows, .*=256 is too small; .*=320"
    ):
        prepare_corpus(data, vocab_size=256)
