"""Tokenizers, made here with the tokenizers library."""

import json
import os
import time
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


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"not json\n", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100_000, b"[]", b"[NaN]"],
)
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


def _bytes_tokenizer(path: Path, *, special: bool = True, ignore_merges: bool = False) -> Path:
    """A token per byte, <|endoftext|> for the end of a document, <|im_start|> besides."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<|endoftext|>": 256}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    tokenizer.decoder = decoders.ByteLevel()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["<|endoftext|>", "<|im_start|>"])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_in_a_text_are_text(special: bool, tmp_path: Path) -> None:
    """The end of a document is none, even where the file calls it an ordinary added token."""
    path = _bytes_tokenizer(tmp_path / "t.json", special=special)
    tokenizer, text = build_tokenizer(DataConfig(tokenizer=str(path))), b"a <|endoftext|> b <|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id == 256
    assert len(ids) == len(text)
    assert (ids != 256).all()
    lines = tokenizer.findings()
    assert lines == [
        f"data.tokenizer={path}: 2 special tokens are written in the text, most often <|endoftext|> (2); "
        "they are taken for text"
    ]
    named = build_tokenizer(DataConfig(tokenizer=str(path), special_tokens=True))
    assert named.encode(text + b"<|im_start|>")[[2, -2, -1]].tolist() == [256, 256, 257]
    assert named.fingerprint != tokenizer.fingerprint
    assert "they are taken for what they name (data.special_tokens=true)" in named.findings()[0]


def test_no_word_of_a_vocabulary_ends_a_document(tmp_path: Path) -> None:
    """Where the vocabulary has the end as a word too, a text with this word is cut there."""
    path = _bytes_tokenizer(tmp_path / "t.json", ignore_merges=True)
    library: Any = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    assert 256 in library.encode("<|endoftext|>", add_special_tokens=False).ids
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(path)))
    text = "<|endoftext|>"
    assert library.decode(tokenizer.encode(text.encode()).tolist(), skip_special_tokens=False) == text
    assert 256 not in tokenizer.encode(b"<|endoftext|>")

    ordinary = tmp_path / "ordinary.json"
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?")).save(str(ordinary))
    with pytest.raises(
        ValueError, match=r"</s> is an ordinary entry of its vocabulary, which text can give, .*; add"
    ):
        build_tokenizer(DataConfig(tokenizer=str(ordinary)))


def _lossy(kind: str) -> Any:
    """Tokenizers of words a and b."""
    made: dict[str, Any] = {
        "BPE": models.BPE(vocab={"a": 0, "b": 1}, merges=[]),
        "BPE with unknown": models.BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[], unk_token="?"),
        "Unigram": models.Unigram([("a", -1.0), ("b", -2.0)]),
        "Unigram with unknown": models.Unigram([("a", -1.0), ("b", -2.0), ("?", -9.0)], unk_id=2),
        "WordPiece": models.WordPiece({"a": 0, "b": 1}, unk_token="?"),
        "WordPiece with unknown": models.WordPiece({"a": 0, "b": 1, "?": 2}, unk_token="?"),
        "WordLevel": models.WordLevel({"a": 0, "b": 1}, unk_token="?"),
        "WordLevel with unknown": models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"),
    }
    tokenizer: Any = Tokenizer(made[kind])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


LOSSES = {
    "BPE": "2 of 8 characters have no token and are lost, 25.0% where data.max_unknown=0.01 are allowed; ",
    "BPE with unknown": "2 of 8 tokens are the unknown one, 25.0% where",
    "Unigram": "cannot encode the corpus (",
    "Unigram with unknown": "1 of 7 tokens are the unknown one, 14.3% where",
    "WordPiece": "cannot encode the corpus (",
    "WordPiece with unknown": "1 of 7 tokens are the unknown one, 14.3% where",
    "WordLevel": "cannot encode the corpus (",
    "WordLevel with unknown": "1 of 7 tokens are the unknown one, 14.3% where",
}


@pytest.mark.parametrize("kind", LOSSES)
def test_text_that_a_tokenizer_loses(kind: str, tmp_path: Path) -> None:
    """Refused above a share, told below it; nothing is left in the cache."""
    path = tmp_path / "t.json"
    _lossy(kind).save(str(path))
    message = _error(tmp_path, path, text="a b a b a b \u4f60\u597d".encode())
    assert message.startswith(f"data.tokenizer={path}: {LOSSES[kind]}"), message
    # beside the mark that it is a cache
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["CACHEDIR.TAG"]
    data = _data(tmp_path, tmp_path / "a.txt", path)
    data.max_unknown = 0.5
    told: list[str] = []
    if "cannot" in LOSSES[kind]:
        with pytest.raises(ValueError, match="cannot encode the corpus"):
            prepare_corpus(data, vocab_size=300)
    else:
        prepare_corpus(data, vocab_size=300, log=told.append)
        assert any(
            line.startswith(f"data.tokenizer={path}: {LOSSES[kind].partition(',')[0]} (") for line in told
        )


def test_known_text_is_not_told(tmp_path: Path) -> None:
    for kind in LOSSES:
        _lossy(kind).save(str(tmp_path / "t.json"))
        tokenizer = build_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
        assert tokenizer.encode(b"a b  a\n").tolist() == [0, 1, 0]
        assert tokenizer.findings() == []


def test_tokens_are_no_matter_of_chance(tmp_path: Path) -> None:
    """Dropout is for training a tokenizer's user on noise; a cache would keep one throw of the dice."""
    path = _tokenizer_json(tmp_path)
    want = build_tokenizer(DataConfig(tokenizer=str(path))).encode(TEXT.encode())
    settings = json.loads(path.read_text())
    settings["model"]["dropout"] = 0.5
    path.write_text(json.dumps(settings))
    assert build_tokenizer(DataConfig(tokenizer=str(path))).encode(TEXT.encode()).tolist() == want.tolist()


def test_tokenizer_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (("/dev/zero", "a device"), (f"{tmp_path}/pipe", "a pipe")):
        message = _error(tmp_path, Path(path))
        assert message.startswith(
            f"data.tokenizer={path}: cannot be read (is {reason}, not a regular file); give"
        )


def test_panics_of_the_library_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no Exception."""
    path = _tokenizer_json(tmp_path)

    class Panic(BaseException):
        pass

    def panic(*_arguments: object) -> None:
        raise Panic("called `Option::unwrap()`\non a `None` value")

    monkeypatch.setattr("tokenizers.Tokenizer.from_str", panic)
    assert "is not a tokenizer.json of the tokenizers library (called `Option::" in _error(tmp_path, path)


def test_regular_expressions_without_end_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tries a cubic number of ways from each letter on: too few for the library to give up itself."""
    path = _tokenizer_json(tmp_path)
    settings = json.loads(path.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "a*a*a*(?<=z)"},
        "behavior": "Isolated",
        "invert": False,
    }
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, settings["pre_tokenizer"]],
    }
    path.write_text(json.dumps(settings))
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(path)))
    assert tokenizer.encode(b"aaz").size
    monkeypatch.setattr("msa_train.data.json_tokenizer._LIMIT_S", 0.5)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"tokenizer\.json: has not encoded 30,000 characters of the corpus"):
        tokenizer.encode((b"a" * 299 + b" ") * 100)
    assert time.monotonic() - begin < 60
