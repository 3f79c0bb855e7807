"""Measure MSA's CPU path against torch's causal attention on the same cores; write a table and JSON.

python -m benchmarks.cpu_kernels.run                                       # all of it, about half an hour
python -m benchmarks.cpu_kernels.run --lengths 8192 --memory-lengths --rounds 1      # a minute
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cpu_kernels.report import markdown
from benchmarks.cpu_kernels.shape import CoreShape
from benchmarks.machine import ROOT, command, machine

# Worst row where both compute the same, relative to the largest: fp32 sums in another order
TOLERANCE = 2e-5
# Above this length dense attention is measured with a head per core, and its time multiplied
LONGEST_WHOLE = 32768
# A time counts if other processes, and other guests of the machine, took no more of the cores
MAX_OTHERS_SHARE = 0.05


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32768, 131072], help="timed")
    parser.add_argument(
        "--memory-lengths",
        nargs="*",
        type=int,
        default=[32768, 65536, 131072, 262144, 524288],
        help="of which the peak is taken, with head dims of a quarter of the size",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2, help="of each length, the two in turns")
    parser.add_argument("--long-rounds", type=int, default=1, help="above 32768 tokens")
    parser.add_argument("--tries", type=int, default=3, help="of each timed run, until nothing disturbs it")
    parser.add_argument("--wait-s", type=float, default=300, help="for idle cores before each, at most")
    parser.add_argument("--head-dim", type=int, default=CoreShape().head_dim, help="of queries and index")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    block = CoreShape().block_size
    for length in arguments.lengths + arguments.memory_lengths:
        if length < block or length % block:
            raise ValueError(f"length {length}: must be a multiple of the block size, {block}")
    if arguments.head_dim < 4 or arguments.head_dim % 4:
        raise ValueError(f"--head-dim={arguments.head_dim}: must be a multiple of 4, and at least 4")
    for name in ("threads", "rounds", "long_rounds", "tries"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure and write; exit code 2 on a bad command line, 1 where a measurement fails."""
    try:
        arguments = parse(argv)
    except ValueError as error:
        print(f"cpu_kernels benchmark: error: {error}", file=sys.stderr)
        return 2
    try:
        print(
            measure(arguments, command("benchmarks.cpu_kernels.run", sys.argv[1:] if argv is None else argv))
        )
    except RuntimeError as error:
        print(f"cpu_kernels benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def measure(arguments: argparse.Namespace, started_by: str) -> str:
    """Check, times, peaks; written after each, so that an interrupted run leaves what it has. The table.

    Raises:
        RuntimeError: if a measurement ends with an error, or the two differ where they must not.
    """
    start = time.monotonic()
    shape = CoreShape(head_dim=arguments.head_dim, index_dim=arguments.head_dim)
    small = replace(shape, head_dim=shape.head_dim // 4, index_dim=shape.index_dim // 4)
    worst = _work(arguments, shape, "check")["worst_row"]
    print(f"worst row against torch where every block is selected: {worst:.1e}", flush=True)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"the worst row is off by {worst:.1e}, more than {TOLERANCE}: nothing is timed")
    result: dict[str, Any] = {
        "command": started_by,
        "machine": machine(),
        "threads": arguments.threads,
        "shape": asdict(shape),
        "memory_shape": asdict(small),
        "worst_row": worst,
        "times": [],
        "memory": [],
    }
    text = ""
    for length in arguments.lengths:
        result["times"].append(_time(arguments, shape, length))
        text = _write(arguments.out, result | {"seconds": time.monotonic() - start})
    for length in arguments.memory_lengths:
        found = _work(arguments, small, "msa", length)
        result["memory"].append({"seq_len": length, **found})
        print(f"{length} tokens: peak {found['peak_bytes'] / 2**30:.2f} GiB", flush=True)
        text = _write(arguments.out, result | {"seconds": time.monotonic() - start})
    return text


def _write(folder: Path, result: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu_kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (folder / "cpu_kernels.md").write_text(text)
    return text


def _time(arguments: argparse.Namespace, shape: CoreShape, length: int) -> dict[str, Any]:
    """Time both at one length, in turns; at the longest whole length few heads too, to see what that says."""
    few = min(arguments.threads, shape.num_heads)
    heads = [shape.num_heads] if length < LONGEST_WHOLE else [few]
    if length == LONGEST_WHOLE:
        heads = [shape.num_heads, few]
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds if length <= LONGEST_WHOLE else arguments.long_rounds):
        runs.setdefault("msa", []).append(_undisturbed(arguments, shape, "msa", length))
        for count in heads:
            found = _undisturbed(arguments, shape, "dense", length, dense_heads=count)
            runs.setdefault(f"dense_{count}", []).append(found)
    row: dict[str, Any] = {"seq_len": length, "dense_heads": heads, "runs": runs}
    row["msa_s"] = statistics.median(run["seconds"] for run in runs["msa"])
    for count in heads:
        median = statistics.median(run["seconds"] for run in runs[f"dense_{count}"])
        row[f"dense_{count}_s"] = median
        row[f"dense_{count}_scaled_s"] = median * shape.num_heads / count
    row["ratio"] = row[f"dense_{heads[0]}_scaled_s"] / row["msa_s"]
    print(f"{length} tokens: MSA {row['msa_s']:.1f} s, {row['ratio']:.2f} times as fast", flush=True)
    return row


def _undisturbed(
    arguments: argparse.Namespace, shape: CoreShape, what: str, length: int, dense_heads: int = 0
) -> dict[str, Any]:
    """Make one measurement while nothing else runs; the least disturbed of `--tries`."""
    found: list[dict[str, Any]] = []
    for _ in range(arguments.tries):
        _wait_until_idle(arguments.wait_s)
        found.append(_work(arguments, shape, what, length, dense_heads))
        share = found[-1]["others_share"]
        if share <= MAX_OTHERS_SHARE:
            break
        print(f"{what} at {length} tokens: others took {share:.0%} of the cores", flush=True)
    return min(found, key=lambda run: run["others_share"])


def _wait_until_idle(limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while psutil.cpu_percent(interval=2) > 100 * MAX_OTHERS_SHARE and time.monotonic() < deadline:
        pass


def _work(
    arguments: argparse.Namespace, shape: CoreShape, what: str, length: int = 0, dense_heads: int = 0
) -> dict[str, Any]:
    """Make one measurement in a new process, so that its peak is its own."""
    request = {
        "what": what,
        "seq_len": length,
        "shape": asdict(shape),
        "threads": arguments.threads,
        "dense_heads": dense_heads,
    }
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_kernels.worker", json.dumps(request)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{what} at {length} tokens ended with exit code {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
