"""Documents of which every eight bytes tell where they come from, and runs that mix them."""

from pathlib import Path
from typing import Any

from msa_train.config import DataConfig, ModelConfig, RunConfig, StageConfig, TrainConfig
from msa_train.data import Pack

BYTES_EOD = 256
WORD = 8


def write_source(folder: Path, letter: str, lengths: list[int]) -> Path:
    """Write documents of so many words, each different from all others; returns their folder."""
    root = folder / letter
    root.mkdir(parents=True)
    for number, length in enumerate(lengths):
        words = [f"{letter}{number:03d}{word:04x}" for word in range(length)]
        assert all(len(word) == WORD for word in words)
        (root / f"{number:03d}.txt").write_text("".join(words))
    return root


def mixed_run(
    folder: Path,
    mixture: dict[str, Any],
    stages: dict[str, StageConfig] | None = None,
    *,
    seq_len: int = 4096,
    held_out: float = 0.0,
) -> RunConfig:
    """A run over such sources, two packs per step."""
    config = RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(vocab_size=320),
        data=DataConfig(
            mixture=mixture,
            seq_len=seq_len,
            validation_fraction=held_out,
            cache_dir=str(folder / "cache"),
            seed=7,
        ),
        train=TrainConfig(steps=0 if stages else 40, global_batch_size=2, validate_every=0),
        stages=stages or {},
    )
    config.attention.block_size = 128
    return config


def words_of(pack: Pack) -> list[str]:
    """Read the words of a pack; the ends of documents are left out."""
    words: list[str] = []
    for start, length in zip(pack.cu_seqlens[:-1].tolist(), pack.doc_lengths.tolist(), strict=True):
        piece = pack.tokens[start : start + length]
        text = bytes(piece[piece != BYTES_EOD].astype("uint8")).decode()
        assert len(text) % WORD == 0, "pieces begin at words"
        words += [text[i : i + WORD] for i in range(0, len(text), WORD)]
    return words
