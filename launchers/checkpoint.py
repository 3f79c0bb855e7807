"""Run msa-checkpoint: list, verify, prune and compare checkpoints.

`ls` reads names, sizes and meta.json. `verify` and `diff` read every byte: a checkpoint of a model of 1B
parameters has about 16 GB (fp32 weights, AdamW's master weights and two moments), whatever number of ranks
wrote it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.cli.command_line import Parser, number, run_command
from launchers.cli.output import say
from launchers.worker import accept_fallbacks
from msa_train.checkpoint.manifest import (
    MANIFEST_NAME,
    read_manifest,
    read_meta,
    structure_damage,
    verify_folder,
)
from msa_train.checkpoint.meta import META_NAME
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.safe_pickles import METADATA_NAME
from msa_train.config import printable

DESCRIPTION = "Lists, verifies, removes and compares checkpoints of msa-train."
EPILOG = """\
examples:
  msa-checkpoint ls runs/demo                         # step, time, size, layout, engine, sound?
  msa-checkpoint verify runs/demo                     # every checksum; exit code 1 if one is wrong
  msa-checkpoint prune runs/demo --keep-last 2 --keep-every 1000 --dry-run
  msa-checkpoint diff runs/a runs/b/checkpoints/step_00000200      # exit code 1 if they differ

A run_dir stands for its newest checkpoint where one is meant."""
# as diff(1) and cmp(1): 1 is an answer, 2 is trouble
DIFFERENT = DAMAGED = 1
_SIZES = ("tp", "pp", "cp", "ep", "dp")
_COLUMNS = ("step", "time", "size", "stage", "layout", "engine", "sound")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 1 where checkpoints are damaged or differ, 2 for bad input or files, 130 if interrupted.
    """

    def run() -> int:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)

    return run_command("msa-checkpoint", run)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="msa-checkpoint", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|prune|diff")
    ls = commands.add_parser("ls", help="what checkpoints there are")
    ls.add_argument("paths", metavar="RUN_DIR", type=Path, nargs="+", help="run_dir or checkpoint folder")
    ls.add_argument("--json", action="store_true", help="print JSON instead of a table")
    ls.set_defaults(run=_ls)
    verify = commands.add_parser("verify", help="read every file: checksums, numbers not finite")
    verify.add_argument("paths", metavar="RUN_DIR", type=Path, nargs="+", help="run_dir or checkpoint folder")
    verify.add_argument("--quick", action="store_true", help="names and sizes only")
    verify.set_defaults(run=_verify)
    prune = commands.add_parser("prune", help="remove older checkpoints of a run")
    prune.add_argument("path", metavar="RUN_DIR", type=Path)
    prune.add_argument(
        "--keep-last", type=int, required=True, metavar="N", help="sound ones that stay, at least 1"
    )
    prune.add_argument(
        "--keep-every", type=int, default=0, metavar="M", help="multiples of this step stay too"
    )
    prune.add_argument(
        "--stage-ends", action="store_true", help="also those with which a stage ended, which stay otherwise"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    prune.set_defaults(run=_prune)
    diff = commands.add_parser("diff", help="settings and numbers in which two checkpoints differ")
    diff.add_argument("first", metavar="A", type=Path, help="run_dir or checkpoint folder")
    diff.add_argument("second", metavar="B", type=Path)
    diff.add_argument(
        "--tolerance", type=number, default=0.0, metavar="X", help="differences up to X are none"
    )
    diff.add_argument("--json", action="store_true", help="print JSON instead of lines")
    diff.set_defaults(run=_diff)
    return parser


def _ls(arguments: argparse.Namespace) -> int:
    """Print a line for each checkpoint; a damaged one gets its line too, so the exit code is 0."""
    rows = [_row(folder) for path in arguments.paths for folder in _folders(path)]
    if arguments.json:
        say(json.dumps(rows, indent=1), lines=True)
        return 0
    cells = [[*_COLUMNS], *([printable(_text(row, name)) for name in _COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _row(folder: Path) -> dict[str, Any]:
    """Collect the row of a checkpoint: size in bytes, time in seconds since 1970, `sound` or why not."""
    reason = structure_damage(folder)
    row: dict[str, Any] = {"path": str(folder), "sound": reason or True}
    try:
        row["time"] = (folder / MANIFEST_NAME).stat().st_mtime
        row["size"] = sum(entry["size"] for entry in read_manifest(folder).values())
        meta = read_meta(folder)
    except (OSError, ValueError):
        # what can be told of a damaged one; `sound` has the reason
        return row
    for name in ("step", "layout", "engine", "format_version", "optimizer_updates", "tokens", "content"):
        if name in meta:
            row[name] = meta[name]
    if reason is None and meta.get("stages"):
        row |= {"stage": meta["stages"][-1]["name"], "ends_stage": meta.get("ends_stage", False)}
    return row


def _text(row: dict[str, Any], name: str) -> object:
    """Format one cell of the table; `layout` names the sizes above 1, e.g. "cp4 ep4 dp2"."""
    value = row.get(name)
    if name == "step" and value is None:
        return Path(row["path"]).name
    if value is None:
        return "-"
    if name == "time":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if name == "size":
        return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"
    if name == "stage":
        return f"{value} (end)" if row["ends_stage"] else value
    if name == "layout" and row["sound"] is True:
        sizes = [f"{size}{value[f'{size}_size']}" for size in _SIZES if value.get(f"{size}_size", 1) > 1]
        return " ".join(sizes) or "1 process"
    return "yes" if value is True else str(value)


def _verify(arguments: argparse.Namespace) -> int:
    """Check all checkpoints that are named, and go on after a damaged one: a user wants the whole list."""
    code = 0
    for path in arguments.paths:
        for folder in _folders(path):
            # checksums first: only files that are as they were written are worth loading as tensors
            reason = verify_folder(folder, full=not arguments.quick)
            if reason is None and not arguments.quick and METADATA_NAME in read_manifest(folder):
                reason = _values_damage(folder)
            say(f"{folder}: {reason or 'sound'}")
            code = DAMAGED if reason else code
    return code


def _values_damage(folder: Path) -> str | None:
    """Say which tensor holds numbers that are not finite; None if there is none."""
    # torch takes seconds
    accept_fallbacks()
    from msa_train.checkpoint.diff import values_damage

    return values_damage(folder)


def _prune(arguments: argparse.Namespace) -> int:
    """Remove checkpoints, but for the last sound ones, and multiples and ends of stages that are to stay."""
    for name in ("keep_last", "keep_every"):
        # the lowest value: True, so 1, for keep_last; False, so 0, for keep_every
        if (value := getattr(arguments, name)) < (name == "keep_last"):
            lowest = "at least 1" if name == "keep_last" else "0 (none) or a number of steps"
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be {lowest}")
    store = _store(arguments.path)
    word = "would be removed" if arguments.dry_run else "removed"
    keeps = {"keep_stage_ends": not arguments.stage_ends, "dry_run": arguments.dry_run}
    for step in store.prune(arguments.keep_last, arguments.keep_every, **keeps):
        say(f"{store.path(step)}: {word}")
    kept = ", ".join(map(str, store.steps())) if not arguments.dry_run else "see above"
    say(f"kept: {kept}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    """Print settings and tensors in which two checkpoints differ; returns DIFFERENT if there is any."""
    # torch takes seconds
    accept_fallbacks()
    from msa_train.checkpoint.diff import diff_checkpoints

    first, second = (_one(path) for path in (arguments.first, arguments.second))
    found = diff_checkpoints(first, second, tolerance=arguments.tolerance)
    if arguments.json:
        tensors = {
            one.key: {"notes": one.notes, "num_different": one.num_different, "max_abs": one.max_abs}
            for one in found.different
        }
        content = {"settings": found.settings, "missing": found.missing, "extra": found.extra}
        say(json.dumps({**content, "different": tensors, "num_equal": found.num_equal}, indent=1), lines=True)
        return 0 if found.is_empty else DIFFERENT
    for name, (ours, theirs) in found.settings.items():
        say(f"{name}: {ours}, {theirs}")
    for key in found.missing:
        say(f"{key}: only in {first}")
    for key in found.extra:
        say(f"{key}: only in {second}")
    for one in found.different:
        numbers = f"{one.num_different} of {one.num_elements} differ, by up to {one.max_abs:.3g}"
        say(f"{one.key}: {'; '.join([*one.notes, *([numbers] if one.num_different else [])])}")
    counts = f"{found.num_equal} tensors are equal, {len(found.different)} differ"
    say(f"{counts}; largest difference {found.worst:.3g}")
    return 0 if found.is_empty else DIFFERENT


def _store(path: Path) -> CheckpointStore:
    """Open the store of a run, named by its run_dir or by the folder `checkpoints` in it."""
    store = CheckpointStore(path.parent if path.name == "checkpoints" else path)
    if not store.steps():
        state = "has no checkpoint" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {state}; name the run_dir of a run that has saved")
    return store


def _folders(path: Path) -> list[Path]:
    """List the checkpoint that a path is, or all of a run, oldest first."""
    if (path / META_NAME).exists() or (path / MANIFEST_NAME).exists():
        return [path]
    store = _store(path)
    return [store.path(step) for step in store.steps()]


def _one(path: Path) -> Path:
    """Pick the checkpoint that a path is, or the newest of a run, and refuse a damaged one."""
    folder = _folders(path)[-1]
    reason = structure_damage(folder)
    if reason is not None:
        raise ValueError(f"checkpoint {folder}: is damaged ({reason}); name another one")
    return folder


if __name__ == "__main__":
    sys.exit(main())
