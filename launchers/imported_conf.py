"""What an import leaves beside the weights: a configuration folder that trains them, and the tokenizer."""

import json
import shutil
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from msa_train.config import AttentionConfig, ModelConfig
from msa_train.files import new_file

NAME = "imported"
SEQ_LEN = 8192
_TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *("merges.txt", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "configuration.json"),
)

RUN = """\
# @package _global_
# the weights of {source}
defaults:
  - override /model: {name}
  - override /attention: {name}
  - override /data: text
  - override /train: bf16

name: {name}
run_dir: runs/${{name}}
data:
  tokenizer: {tokenizer}
  seq_len: {seq_len}
checkpoint:
  load: {load}
"""


def write_conf(
    target: Path, model: ModelConfig, attention: AttentionConfig, *, tokenizer: Path | None, source: str
) -> Path:
    """Write options `imported` of the groups model, attention and run.

    Args:
        target: where the checkpoint is; conf/ is made in it.
        model, attention: shape of the model.
        tokenizer: tokenizer.json, or None.
        source: where the weights come from, for comments.

    Returns:
        The folder, for msa-train --config-dir.
    """
    conf, source = target / "conf", " ".join(source.split())
    seq_len = max(1, SEQ_LEN // attention.block_size) * attention.block_size
    run = RUN.format(
        name=NAME,
        source=source,
        tokenizer=json.dumps(str(tokenizer.absolute()) if tokenizer else "tokenizer.json"),
        seq_len=seq_len,
        load=json.dumps(str(target.absolute())),
    )
    texts = {"model": _group(model, source), "attention": _group(attention, source), "run": run}
    for group, text in texts.items():
        (conf / group).mkdir(parents=True, exist_ok=True)
        with new_file(conf / group / f"{NAME}.yaml") as file:
            file.write(text)
    return conf


def copy_tokenizer(source: Path, target: Path) -> Path | None:
    """Copy the tokenizer's files; returns tokenizer.json, or None where there is none."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            _copy(source / name, target / name)
    return target / "tokenizer.json" if (target / "tokenizer.json").is_file() else None


def copy_rest(source: Path, target: Path) -> None:
    """Copy what else a Hugging Face folder holds: tokenizer, code, licence; not the weights or model card."""
    for path in sorted(source.iterdir()):
        own = path.name in ("config.json", "README.md") or path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not own and not path.name.startswith("."):
            _copy(path, target / path.name)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, new_file(target, "wb") as copy:
        shutil.copyfileobj(file, copy)


def _group(section: Any, source: str) -> str:
    values = {
        name: value.value if isinstance(value, Enum) else value for name, value in asdict(section).items()
    }
    return f"# as {source} has it\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=False)
