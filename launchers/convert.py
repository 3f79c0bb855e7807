"""The msa-convert command: Hugging Face checkpoints of MiniMax-M2 and M3 to ours and back."""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.command_line import Parser, run_command
from launchers.imported_conf import copy_files, rest_files, tokenizer_files, write_conf
from launchers.output import say
from launchers.worker import accept_fallbacks

DESCRIPTION = """\
Converts between Hugging Face checkpoints (minimax_m2, the language model of minimax_m3_vl) and checkpoints of
msa-train. Less than 100 MB of weights are in memory at a time, whatever the size of the model."""
EPILOG = """\
examples:
  msa-convert import MiniMax-M3 runs/m3 --skip-unplaced    # leaves out the vision tower, after naming it
  msa-train --config-dir runs/m3/conf run=imported data.corpus=/data/notes
  msa-convert export runs/imported M3-tuned --like MiniMax-M3   # same names and files, vision tower copied
  msa-convert export runs/demo demo-hf                     # a bare text model for AutoModelForCausalLM"""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
PROGRESS_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input or files, 130 if interrupted.
    """

    def run() -> None:
        arguments = _parser().parse_args(argv)
        (_import if arguments.command == "import" else _export)(arguments)

    return run_command("msa-convert", run, when_interrupted="; nothing was left behind")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="msa-convert", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    into = commands.add_parser("import", help="a Hugging Face checkpoint to ours", formatter_class=raw)
    into.add_argument(
        "source", metavar="HF_DIR", type=Path, help="folder with config.json and safetensors files"
    )
    into.add_argument("target", metavar="OUT", type=Path, help="gets checkpoints/, conf/ and tokenizer/")
    into.add_argument(
        "--skip-unplaced",
        action="store_true",
        help="leave out tensors that have no place, e.g. the vision tower",
    )
    into.add_argument("--allow-zeros", action="store_true", help="keep matrices that are zeros all over")
    into.add_argument(
        "--dequantize", action="store_true", help="make bf16 of 8-bit weights with block scales"
    )
    out = commands.add_parser(
        "export", help="a checkpoint of ours to Hugging Face's form", formatter_class=raw
    )
    out.add_argument(
        "source", metavar="RUN", type=Path, help="run_dir (its newest checkpoint) or checkpoint folder"
    )
    out.add_argument("target", metavar="HF_DIR", type=Path, help="new folder")
    out.add_argument(
        "--like",
        metavar="HF_DIR",
        type=Path,
        help="take names, files, config.json, tokenizer and tensors without a place from this checkpoint",
    )
    out.add_argument("--dtype", choices=["bf16", "fp32"], help="of the weights; default: as they are stored")
    out.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest file, e.g. 500MB (default 5GB)"
    )
    out.add_argument(
        "--no-checksums",
        action="store_true",
        help="trust the checkpoint's files, e.g. after msa-checkpoint verify",
    )
    out.add_argument("--max-positions", type=int, metavar="N", help="max_position_embeddings of config.json")
    for command in (into, out):
        command.add_argument("--dry-run", action="store_true", help="list the mapping and write nothing")
        command.add_argument(
            "--ignore-field",
            action="append",
            default=[],
            metavar="NAME",
            help="treat this field of config.json as absent (may be repeated)",
        )
    return parser


def _import(arguments: argparse.Namespace) -> None:
    # megatron and torch take seconds: --help and mistakes in the arguments need not wait for them
    accept_fallbacks()
    from msa_train.model.hf_config import read_hf_config
    from msa_train.model.hf_contents import ContentCheck, dtype_warning
    from msa_train.model.hf_export import read_config_file
    from msa_train.model.hf_import import check_unplaced, plan_import, write_import
    from msa_train.training.weights_checkpoint import publish_weights

    source, target = arguments.source, arguments.target
    config = read_config_file(source)
    hf = read_hf_config(config, ignore=arguments.ignore_field)
    if hf.fp8_block is not None and not arguments.dequantize:
        raise ValueError(
            "quantization_config.quant_method=fp8: the weights have 8 bits; --dequantize makes bf16 of them, "
            "or use a bf16 checkpoint"
        )
    plan = plan_import(source, hf)
    if arguments.dry_run:
        for span in plan.table.spans:
            say(_mapping(span.name, span.name_row, span.num_rows, span.key, span.key_row))
        for name in plan.unplaced:
            say(f"{name} -> no place")
        say(
            f"{len(plan.table.hf_shapes)} tensors, {_size(plan.num_bytes)}; {len(plan.unplaced)} without a "
            "place; nothing was written"
        )
        return
    for name in plan.unplaced:
        say(f"no place: {name}")
    check_unplaced(plan.unplaced, skip=arguments.skip_unplaced)
    tokenizer = tokenizer_files(source)
    _warn([dtype_warning(config, plan.dtypes)])
    check = ContentCheck(plan.table.hf_shapes, allow_zeros=arguments.allow_zeros)
    _check_space(target, plan.num_bytes + _size_of(tokenizer))
    progress = _Progress("imported", plan.num_bytes)
    folder = publish_weights(
        target,
        hf.model,
        hf.attention,
        lambda folder: write_import(plan, folder, progress.add, check=check),
        source=str(source),
    )
    progress.end()
    _warn(check.warnings())
    copy_files(tokenizer, target / "tokenizer")
    json_file = target / "tokenizer/tokenizer.json" if "tokenizer.json" in tokenizer else None
    conf = write_conf(target, hf.model, hf.attention, tokenizer=json_file, source=str(source))
    say(f"checkpoint: {folder}")
    say(f"train it:   msa-train --config-dir {shlex.quote(str(conf))} run=imported data.corpus=/your/text")
    if json_file is None:
        say(f"            {source} has no tokenizer.json: add data.tokenizer=PATH")


def _export(arguments: argparse.Namespace) -> None:
    accept_fallbacks()
    import torch

    from msa_train.model.hf_config_write import DEFAULT_MAX_POSITIONS
    from msa_train.model.hf_export import plan_export, read_config_file, write_export
    from msa_train.training.weights_checkpoint import checkpoint_folder, shape_of

    source, target = arguments.source, arguments.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already; name a new folder")
    folder = checkpoint_folder(source)
    shard_bytes = _bytes(arguments.shard_size)
    rest: dict[str, Path] = {}
    if arguments.like is not None:
        read_config_file(arguments.like)
        rest = rest_files(arguments.like)
    if not arguments.no_checksums:
        _check_checksums(folder, only_small=arguments.dry_run)
    model, attention = shape_of(folder)
    plan = plan_export(
        folder,
        model,
        attention,
        like=arguments.like,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[arguments.dtype],
        shard_bytes=shard_bytes,
        max_positions=arguments.max_positions or DEFAULT_MAX_POSITIONS,
        ignore=arguments.ignore_field,
    )
    if arguments.dry_run:
        for span in plan.table.spans:
            say(_mapping(span.key, span.key_row, span.num_rows, span.name, span.name_row))
        for name in plan.copied:
            say(f"copied from {arguments.like}: {name}")
        tensors = sum(map(len, plan.files.values()))
        say(f"{tensors} tensors in {len(plan.files)} files, {_size(plan.num_bytes)}; nothing was written")
        return
    _check_space(target, plan.num_bytes + _size_of(rest))
    progress = _Progress("exported", plan.num_bytes)
    write_export(plan, target, progress.add)
    progress.end()
    copy_files(rest, target)
    say(
        f"{folder} -> {target}: {len(plan.files)} files, {len(plan.copied)} tensors copied from another "
        "checkpoint"
    )


class _Progress:
    """How much is done: one line that is written over on a terminal, a line every few seconds elsewhere."""

    def __init__(self, word: str, total: int) -> None:
        self.word, self.total, self.done = word, total, 0
        self.begin = self.last = time.monotonic()
        self.on_terminal = sys.stdout.isatty()

    def add(self, num_bytes: int) -> None:
        """Another piece is done."""
        self.done += num_bytes
        now = time.monotonic()
        if now - self.last > (0.2 if self.on_terminal else PROGRESS_S):
            self.last = now
            say(self._text(now), end="\r" if self.on_terminal else "\n")

    def end(self) -> None:
        """All is done."""
        say(self._text(time.monotonic()))

    def _text(self, now: float) -> str:
        seconds = max(now - self.begin, 1e-3)
        return (
            f"{self.word} {_size(self.done)} of {_size(self.total)} "
            f"({100 * self.done // max(self.total, 1)}%), {_size(int(self.done / seconds))}/s"
        )


def _mapping(one: str, one_row: int, count: int, other: str, other_row: int) -> str:
    """q_proj.weight [0:16] -> linear_qkv.weight [0:16]."""
    return f"{one} [{one_row}:{one_row + count}] -> {other} [{other_row}:{other_row + count}]"


def _check_checksums(folder: Path, *, only_small: bool) -> None:
    """Read the checkpoint's files once before a number of them is written on; few of them for --dry-run."""
    from msa_train.training.checkpoint_files import checksum_damage, read_manifest

    entries = {
        name: entry
        for name, entry in read_manifest(folder).items()
        if not only_small or not name.endswith(".distcp")
    }
    progress = _Progress("checked", sum(entry["size"] for entry in entries.values()))
    for name, entry in entries.items():
        reason = checksum_damage(folder, name, entry["crc32"])
        if reason is not None:
            raise ValueError(
                f"checkpoint {folder}: is damaged ({reason}); name another one, or fetch the file again"
            )
        progress.add(entry["size"])
    if not only_small:
        progress.end()


def _size_of(files: dict[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())


def _check_space(target: Path, needed: int) -> None:
    from msa_train.training.checkpoint_store import free_bytes

    free = free_bytes(target)
    if free < needed:
        raise ValueError(f"{target}: {_size(free)} are free and {_size(needed)} are needed; use another disk")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"--shard-size={text}: must be a number and KB, MB, GB or TB; use e.g. 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def _size(num_bytes: int) -> str:
    for unit in ("TB", "GB", "MB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} KB"


def _warn(lines: Sequence[str | None]) -> None:
    for line in lines:
        if line is not None:
            say(f"msa-convert: warning: {line}", error=True)


if __name__ == "__main__":
    sys.exit(main())
