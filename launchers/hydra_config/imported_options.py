"""Write what an import leaves beside the weights: a configuration folder that trains them, and the tokenizer.

Names and texts come from a checkpoint of somebody else: links are not followed out of its folder, and no text
of it gets a line of its own in the YAML.
"""

import json
import os
import shutil
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from msa_train.config import AttentionConfig, ModelConfig
from msa_train.runtime.atomic_files import new_file
from msa_train.runtime.untrusted_files import member, open_regular

NAME = "imported"
# tokens; rounded down to whole blocks of the model
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
    # one line, as it goes into a comment: a line break would end that
    conf, source = target / "conf", " ".join(source.split())
    seq_len = max(1, SEQ_LEN // attention.block_size) * attention.block_size
    run = RUN.format(
        name=NAME,
        source=source,
        # JSON is YAML: quoted, whatever the path holds
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


def tokenizer_files(source: Path) -> dict[str, Path]:
    """Find the tokenizer's files in a Hugging Face folder: name to the file that is read, links followed.

    The cache of huggingface_hub consists of links into a folder beside it, hence links at all.

    Raises:
        ValueError: one line, for a link out of the folder and for what is no regular file.
    """
    return _regular_files(source, [name for name in _TOKENIZER_FILES if os.path.lexists(source / name)])


def rest_files(source: Path) -> dict[str, Path]:
    """Find what else a Hugging Face folder holds: tokenizer, code, licence; not weights, model card, folders.

    Raises:
        ValueError: as `tokenizer_files`.
    """
    own = ("config.json", "README.md"), (".safetensors", ".index.json")
    names = [path.name for path in sorted(source.iterdir())]
    names = [name for name in names if name not in own[0] and not name.endswith(own[1])]
    return _regular_files(source, [name for name in names if not name.startswith(".")])


def copy_files(files: dict[str, Path], target: Path) -> None:
    """Copy files into a folder that is made if there are any; each is whole or absent."""
    for name, path in files.items():
        target.mkdir(parents=True, exist_ok=True)
        with open_regular(path) as content, new_file(target / name, "wb") as copy:
            shutil.copyfileobj(content, copy)


def _regular_files(folder: Path, names: list[str]) -> dict[str, Path]:
    """Resolve names in a folder to regular files that can be opened; folders are left out."""
    found: dict[str, Path] = {}
    for name in names:
        try:
            real = member(folder, name)
            if real.is_dir():
                continue
            open_regular(real).close()
        except OSError as error:
            raise ValueError(
                f"{folder / name}: cannot be read ({error.strerror}); repair or remove it"
            ) from None
        found[name] = real
    return found


def _group(section: Any, source: str) -> str:
    """Write an option of a group as YAML, with where it comes from as its first comment."""
    values = {
        name: value.value if isinstance(value, Enum) else value for name, value in asdict(section).items()
    }
    return f"# as {source} has it\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=False)
