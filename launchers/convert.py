"""Run msa-convert: bring Hugging Face checkpoints of MiniMax-M2 and M3 into our format and back."""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.cli.command_line import Parser, run_command
from launchers.cli.output import say
from launchers.hydra_config.imported_options import copy_files, rest_files, tokenizer_files, write_conf
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
# decimal, as Hugging Face's own max_shard_size reads them
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# between two lines in a log; a terminal's line is written over 5 times a second
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
    """Import a checkpoint: plan, refuse, check the disk, write the weights, then tokenizer and conf.

    What names, shapes and sizes tell is refused before the first byte is written.
    """
    # megatron and torch take seconds: --help and mistakes in the arguments need not wait for them
    accept_fallbacks()
    from msa_train.checkpoint.weights_only import publish_weights
    from msa_train.convert.config_read import read_hf_config
    from msa_train.convert.contents import ContentCheck, dtype_warning
    from msa_train.convert.export_hf import read_config_file
    from msa_train.convert.import_hf import check_unplaced, plan_import, write_import

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
    # after all names were printed: a user who skips them has seen them
    check_unplaced(plan.unplaced, skip=arguments.skip_unplaced)
    # looked for before the weights are written, as a link out of the folder is refused
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
    """Export a checkpoint: compare checksums, plan, check the disk, write the weights, copy the rest.

    The weights are read twice that way; --no-checksums halves it where msa-checkpoint verify has just run.
    """
    accept_fallbacks()
    import torch

    from msa_train.checkpoint.weights_only import checkpoint_folder, shape_of, trained_seq_len
    from msa_train.convert.export_hf import plan_export, read_config_file, write_export

    source, target = arguments.source, arguments.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already; name a new folder")
    # the cheap refusals come before the checksums, which read the whole checkpoint
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
        max_positions=arguments.max_positions or 0,
        trained_len=trained_seq_len(folder),
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
    """Print how much is done: one line that is written over on a terminal, one every PROGRESS_S elsewhere."""

    def __init__(self, word: str, total: int) -> None:
        self.word, self.total, self.done = word, total, 0
        self.begin = self.last = time.monotonic()
        self.on_terminal = sys.stdout.isatty()

    def add(self, num_bytes: int) -> None:
        """Count another piece of so many bytes, and print if it is time to."""
        self.done += num_bytes
        now = time.monotonic()
        if now - self.last > (0.2 if self.on_terminal else PROGRESS_S):
            self.last = now
            say(self._text(now), end="\r" if self.on_terminal else "\n")

    def end(self) -> None:
        """Print the last line, with a line break."""
        say(self._text(time.monotonic()))

    def _text(self, now: float) -> str:
        """Write a line such as "imported 2.5 GB of 10.0 GB (25%), 500.0 MB/s"."""
        seconds = max(now - self.begin, 1e-3)
        return (
            f"{self.word} {_size(self.done)} of {_size(self.total)} "
            f"({100 * self.done // max(self.total, 1)}%), {_size(int(self.done / seconds))}/s"
        )


def _mapping(one: str, one_row: int, count: int, other: str, other_row: int) -> str:
    """Write down where rows of one tensor go.

    Example: "q_proj.weight", 0, 16, "linear_qkv.weight", 32 -> "q_proj.weight [0:16] -> linear_qkv.weight
    [32:48]".
    """
    return f"{one} [{one_row}:{one_row + count}] -> {other} [{other_row}:{other_row + count}]"


def _check_checksums(folder: Path, *, only_small: bool) -> None:
    """Compare the checksums of all files before a single number of them is handed on.

    Args:
        folder: of the checkpoint.
        only_small: leave out the shards of weights, as --dry-run does.
    """
    from msa_train.checkpoint.manifest import checksum_damage, read_manifest

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
    """Sum the bytes of files."""
    return sum(path.stat().st_size for path in files.values())


def _check_space(target: Path, needed: int) -> None:
    """Refuse a disk with fewer than `needed` bytes free."""
    from msa_train.runtime.atomic_files import free_bytes

    free = free_bytes(target)
    if free < needed:
        raise ValueError(f"{target}: {_size(free)} are free and {_size(needed)} are needed; use another disk")


def _bytes(text: str) -> int:
    """Read a size: "1.5 GB" -> 1500000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"--shard-size={text}: must be a number and KB, MB, GB or TB; use e.g. 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def _size(num_bytes: int) -> str:
    """Write a size: 1500000000 -> "1.5 GB"."""
    for unit in ("TB", "GB", "MB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} KB"


def _warn(lines: Sequence[str | None]) -> None:
    """Print warnings to stderr; None stands for none."""
    for line in lines:
        if line is not None:
            say(f"msa-convert: warning: {line}", error=True)


if __name__ == "__main__":
    sys.exit(main())
