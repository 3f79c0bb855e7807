"""Train one step of the tiny model on one document of up to a million tokens, with real ranks; table, JSON.

    python -m benchmarks.million.run --out benchmarks/results

Each run is `msa-train` under py-spy. The long one comes after two short ones, on as many ranks and on half of
them, that must agree. At most --memory-gib are given to a rank, by its limit of address space.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, command, machine
from benchmarks.million.parts import shares
from benchmarks.million.peak_memory import PeakMemory
from msa_train.simulate.reports.text import table, tokens_text
from msa_train.training.metrics.writer import read_metrics

_SAME = [
    "run=demo",
    "attention.block_size=128",
    "attention.topk=16",
    "optim.algorithm=adamw",
    "optim.lr=1e-3",
    "train.steps=1",
    "train.validate_every=0",
    "train.recompute=full",
    "train.tile_tokens=8192",
    "checkpoint.every=0",
    "data.validation_fraction=0",
    "watchdog.timeout_s=0",
    # as long as the slowest rank scores alone
    "launcher.timeout_s=7200",
    "logging.attention_every=0",
]
# glibc keeps what is freed below a size that grows to 32 MiB, half a GiB of a rank. It may keep attention's
# tiles of 4 MiB.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(9 * 2**19), "MALLOC_TRIM_THRESHOLD_": str(9 * 2**19)}
_COMPARED = ("lm_loss", "kl_loss", "grad_norm", "kv_selected_fraction")


def main(argv: list[str] | None = None) -> int:
    """Measure and write.

    Returns:
        0, or 2 after one line on stderr where py-spy is not installed.
    """
    arguments = _parse(argv)
    py_spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if py_spy is None:
        print("benchmarks.million.run: error: py-spy is not installed; pip install py-spy", file=sys.stderr)
        return 2
    how = command("benchmarks.million.run", sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        study = _Study(Path(folder), py_spy, arguments)
        short = min(arguments.compare_tokens, arguments.tokens)
        compared = {ranks: study.run(short, ranks) for ranks in (arguments.ranks // 2, arguments.ranks)}
        found = study.run(arguments.tokens, arguments.ranks)
    result = {
        "command": how,
        "machine": machine(),
        "tokens": arguments.tokens,
        "ranks": arguments.ranks,
        "layers": study.layers,
        "compared": {"tokens": short, "by_ranks": compared},
        "run": found,
    }
    name = f"million{'' if arguments.full_layers == 0 else '_full'}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(page(result))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tokens", type=int, default=2**20, help="of the one document")
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel ranks")
    parser.add_argument("--compare-tokens", type=int, default=32768, help="of the two short runs")
    parser.add_argument("--full-layers", type=int, default=0, help="layers with full attention, of 3")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="address space of a rank")
    parser.add_argument("--looks", type=int, default=4, help="of py-spy in each second")
    return parser.parse_args(argv)


class _Study:
    """Make runs that differ in length and ranks."""

    def __init__(self, folder: Path, py_spy: str, arguments: argparse.Namespace) -> None:
        self.folder, self.py_spy, self.looks = folder, py_spy, arguments.looks
        self.memory = int(arguments.memory_gib * 2**30)
        kinds = ["full"] * arguments.full_layers + ["msa"]
        self.layers = ",".join(kinds)

    def run(self, tokens: int, ranks: int) -> dict[str, Any]:
        """Train one step; its metrics and the share of each part."""
        name = f"{tokens}_{ranks}"
        corpus, run_dir, stacks = (self.folder / f"{kind}_{name}" for kind in ("text", "run", "stacks"))
        corpus.mkdir()
        # the end of the document is a token, too
        (corpus / "document.txt").write_bytes(_document(tokens - 1))
        settings = [
            *_SAME,
            f"model.layer_attention='{self.layers}'",
            f"run_dir={run_dir}",
            f"data.corpus={corpus}",
            f"data.seq_len={tokens}",
            f"parallel.cp_size={ranks}",
            f"parallel.ep_size={ranks}",
            f"launcher.num_processes={ranks}",
        ]
        spy = [self.py_spy, "record", "--subprocesses", "--rate", str(self.looks), "--format", "raw"]
        with PeakMemory(str(run_dir)) as peak:
            subprocess.run(
                [*spy, "--output", str(stacks), "--", sys.executable, "-m", "launchers.train", *settings],
                cwd=ROOT,
                env={**os.environ, **_ALLOCATOR},
                check=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory)),
            )
        (row,) = read_metrics(run_dir)
        found = shares(stacks.read_text().splitlines())
        return {"metrics": row, "shares": found, "peak_gib_by_rank": peak.gib()}


def _document(size: int) -> bytes:
    """Return the first bytes of the standard library's sources, ASCII, files in the order of their paths.

    Raises:
        ValueError: there are fewer.
    """
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        source = path.read_bytes()
        if source.isascii():
            text += source
        if len(text) >= size:
            return bytes(text[:size])
    raise ValueError(f"the standard library has {len(text)} bytes, {size} are needed")


def page(result: dict[str, Any]) -> str:
    """Write the tables."""
    run, ran_on = result["run"], result["machine"]
    row, compared = run["metrics"], result["compared"]
    step_s = row["step_time_s"]
    parts = [["part", "s", "share"]]
    parts += [[part, f"{share * step_s:.0f}", f"{share:.1%}"] for part, share in run["shares"].items()]
    sent = [["bytes of a rank, mean", "MB"]]
    sent += [
        [key.removesuffix("_bytes"), f"{value / 1e6:.1f}"]
        for key, value in row.items()
        if key.endswith("_bytes") and isinstance(value, int | float) and value
    ]
    ranks = list(compared["by_ranks"])
    agree = [["at " + tokens_text(compared["tokens"]), *(f"{count} ranks" for count in ranks), "differs by"]]
    for key in _COMPARED:
        values = [compared["by_ranks"][count]["metrics"].get(key) for count in ranks]
        if None not in values:
            far = abs(values[0] - values[1]) / max(abs(values[1]), 1e-30)
            agree.append([key, *(f"{value:.7g}" for value in values), f"{far:.1e}"])
    return (
        f"# One step at {tokens_text(result['tokens'])} tokens\n\n"
        f"`{result['command']}`, {ran_on['cpu']}, {ran_on['cores']} cores, commit {ran_on['commit']}: one "
        f"document on {result['ranks']} ranks, layers `{result['layers']}`, fp32, one thread a rank. "
        f"Step: {step_s:.0f} s, at most {max(run['peak_gib_by_rank']):.2f} GiB in a rank, loss "
        f"{row['lm_loss']:.6f}, gradient norm {row['grad_norm']:.6f}, "
        f"f {row.get('kv_selected_fraction', float('nan')):.3f}.\n\n"
        + "\n\n".join("\n".join(table(rows)) for rows in (parts, sent, agree))
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
