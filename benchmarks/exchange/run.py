"""Measures one MSA layer's exchange over links of limited rate, in every scheme; writes a table and JSON.

    python -m benchmarks.exchange.run                     # everything, see README.md; needs root or user namespaces
    python -m benchmarks.exchange.run --unshaped          # the same over loopback, as fast as this machine is
    python -m benchmarks.exchange.run --parts 8 --rates 200 --selections 0.2 --rounds 1

Changes nothing outside its own processes and namespaces.
"""

# Before anything imports torch.
# ruff: noqa: E402
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.exchange import namespaces
from benchmarks.exchange.cluster import Cluster, RankError
from benchmarks.exchange.formulas import LayerShape
from benchmarks.exchange.layer import expected_bytes, make_layer
from benchmarks.exchange.namespaces import NoNamespaces, Rates
from benchmarks.exchange.rank import StepReport
from benchmarks.exchange.report import machine, markdown
from benchmarks.exchange.schemes import REFERENCE, SCHEMES
from benchmarks.exchange.selections import TRAINED

ROOT = Path(__file__).resolve().parents[2]
SELECTIONS = ("0.05", "0.2", "0.5", "1.0", TRAINED)
# Worst row of any output or gradient, relative to its size: fp32 sums in another order.
TOLERANCE = 2e-5
MEMORY_SCALE = 4
"the memory of a step is measured with a longer sequence, so that buffers outweigh what a process needs anyway"


@dataclass(slots=True, frozen=True)
class Part:
    """Ranks and their links. nodes: bridges; rates: one after the other."""

    name: str
    ranks: int
    nodes: int
    rates: tuple[Rates, ...]


def all_parts(rates: list[int], node_rates: tuple[int, int]) -> dict[str, Part]:
    """What can be measured, by name."""
    each = tuple(Rates(rank=rate) for rate in rates)
    inside, between = node_rates
    nodes = Part("2x4", 8, 2, (Rates(rank=inside, nodes=between),))
    return {"4": Part("4", 4, 1, each), "8": Part("8", 8, 1, each), "2x4": nodes}


class Measurement:
    """Runs parts and collects rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.shape = LayerShape(seq_len=arguments.seq_len, with_kl=not arguments.no_kl)
        self.selections: list[str] = arguments.selections
        self.schemes: list[str] = [REFERENCE, *(s for s in arguments.schemes if s != REFERENCE)]
        self.rounds, self.shaped = arguments.rounds, not arguments.unshaped
        self.timeout_s: float = arguments.timeout_s
        self.rows: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []

    def run(self, part: Part) -> None:
        """Every selection, rate and scheme of a part."""
        with self._cluster(part) as cluster:
            for selection in self.selections:
                fetched = cluster.call("prepare", selection, self.shape)
                errors = self._check(cluster, selection)
                rates = part.rates if self.shaped else ()
                for rate in (Rates(rank=0), *rates):
                    cluster.limit(rate)
                    rows = self._measure(cluster, selection, errors, fetched)
                    where = {"part": part.name, "rate_mbit": rate.rank, "node_rate_mbit": rate.nodes}
                    self.rows += [{**where, **row} for row in rows]
                    _say(_line(where, rows))

    def measure_memory(self, part: Part, selection: str) -> None:
        """Peak of one step of each scheme, largest rank."""
        shape = replace(self.shape, seq_len=self.shape.seq_len * MEMORY_SCALE)
        with self._cluster(part) as cluster:
            cluster.call("prepare", selection, shape)
            for scheme in self.schemes:
                peaks: list[int] = cluster.call("memory", selection, scheme)
                row = {
                    "part": part.name,
                    "selection": selection,
                    "seq_len": shape.seq_len,
                    "scheme": scheme,
                    "peak_bytes": peaks,
                }
                self.memory.append(row)
                _say(f"memory, {part.name} ranks, f {selection}, {scheme}: {max(peaks) / 2**20:.0f} MiB")

    def _cluster(self, part: Part) -> Cluster:
        return Cluster(part.ranks, num_nodes=part.nodes, shaped=self.shaped, timeout_s=self.timeout_s)

    def _check(self, cluster: Cluster, selection: str) -> dict[str, float]:
        """A first step of every scheme: warms up, and its numbers must be the reference's."""
        cluster.limit(Rates(rank=0))
        errors: dict[str, float] = {}
        for scheme in self.schemes:
            reports: list[StepReport] = cluster.call("step", selection, scheme, True)
            errors[scheme] = max(report.error or 0.0 for report in reports)
            if errors[scheme] > TOLERANCE:
                raise RankError(
                    f"selection {selection}: worst row of {scheme} differs from {REFERENCE} by "
                    f"{errors[scheme]:.1e}, more than {TOLERANCE:.0e}; nothing is reported"
                )
        return errors

    def _measure(
        self, cluster: Cluster, selection: str, errors: dict[str, float], fetched: list[list[int]]
    ) -> list[dict[str, Any]]:
        """Rounds in which the schemes take turns."""
        steps: dict[str, list[list[StepReport]]] = {scheme: [] for scheme in self.schemes}
        for _ in range(self.rounds):
            for scheme in self.schemes:
                steps[scheme].append(cluster.call("step", selection, scheme, False))
        data = make_layer(selection, self.shape, 0, cluster.size)
        layout, groups = data.layout, data.shape.num_kv_heads
        remote = (layout.num_blocks - layout.num_local_blocks) * groups
        served = [sum(row[rank] for row in fetched) for rank in range(cluster.size)]
        pairs = {"fetched": [sum(row) for row in fetched], "served": served}
        rows: list[dict[str, Any]] = []
        for scheme in self.schemes:
            expected = expected_bytes(data, SCHEMES[scheme], **pairs)
            row = {
                "selection": selection,
                "f": sum(pairs["fetched"]) / (remote * cluster.size),
                "f_by_rank": [n / remote for n in pairs["fetched"]],
                "scheme": scheme,
                "worst_row_error": errors[scheme],
                **pairs,
                **summary(steps[scheme]),
                "formula_bytes": [sum(by_purpose.values()) for by_purpose in expected],
                "formula_by_purpose": expected,
            }
            rows.append(row)
        return rows


def summary(steps: list[list[StepReport]]) -> dict[str, Any]:
    """Figures of a scheme's steps: by step, then by rank."""
    last = steps[-1]
    walls = [max(report.wall_s for report in step) for step in steps]

    def mean_by_rank(key: str) -> list[float]:
        return [sum(getattr(step[r], key) for step in steps) / len(steps) for r in range(len(last))]

    counters = [
        [sum(step[r].counters[i] for step in steps) / len(steps) for i in range(4)] for r in range(len(last))
    ]
    return {
        "step_s": walls,
        "step_s_median": sorted(walls)[len(walls) // 2] if len(walls) % 2 else _middle(walls),
        "step_s_min": min(walls),
        "compute_cpu_s": mean_by_rank("compute_s"),
        "process_cpu_s": mean_by_rank("process_cpu_s"),
        "counted_bytes": [sum(report.traffic.values()) for report in last],
        "counted_by_purpose": [report.traffic for report in last],
        "interface_received_bytes": [c[0] for c in counters],
        "interface_sent_bytes": [c[2] for c in counters],
        "interface_packets": [c[1] + c[3] for c in counters],
    }


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return (ordered[half - 1] + ordered[half]) / 2


def _line(where: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    times = "  ".join(f"{row['scheme']} {row['step_s_median']:.3f}" for row in rows)
    rate = f"{where['rate_mbit']} Mbit/s" if where["rate_mbit"] else "no limit"
    between = f" ({where['node_rate_mbit']} between nodes)" if where["node_rate_mbit"] else ""
    first = rows[0]
    return (
        f"{where['part']} ranks, {rate}{between}, f {first['f']:.3f} ({first['selection']}): {times} s/step"
    )


def _say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["4", "8", "2x4"], default=["4", "8", "2x4"])
    parser.add_argument("--rates", nargs="+", type=int, default=[200, 1000], help="Mbit/s of each rank's link")
    parser.add_argument(
        "--node-rates",
        nargs=2,
        type=int,
        default=[1000, 400],
        metavar=("RANK", "NODES"),
        help="Mbit/s of 2x4: each rank's link, and the one between the nodes",
    )
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), help="values of f, and `trained`")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each scheme")
    parser.add_argument("--seq-len", type=int, default=LayerShape().seq_len, help="tokens of constructed packs")
    parser.add_argument("--no-kl", action="store_true", help="leave the index branch's loss out")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--unshaped", action="store_true", help="over loopback; needs no privileges")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="longest wait for any step")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds}: must be at least 1")
    for name in arguments.selections:
        if name != TRAINED and not _is_share(name):
            raise ValueError(f"--selections {name}: must be `{TRAINED}` or a share from 0 to 1")
    return arguments


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Measure and write; exit code 2 where that is not possible here."""
    try:
        arguments = parse(argv)
        if not arguments.unshaped:
            namespaces.enter_own_network()
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"exchange benchmark: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RankError, TimeoutError) as error:
        print(f"exchange benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    # A request to end goes the same way as an interrupt: ranks are killed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    start = time.monotonic()
    measurement = Measurement(arguments)
    parts = all_parts(arguments.rates, tuple(arguments.node_rates))
    for name in arguments.parts if measurement.shaped else [n for n in arguments.parts if n != "2x4"]:
        measurement.run(parts[name])
    if arguments.memory:
        measurement.measure_memory(parts[arguments.parts[-1]], "0.2")
    result = {
        "command": " ".join(["python -m benchmarks.exchange.run", *argv]),
        "seconds": time.monotonic() - start,
        "machine": machine(),
        "shape": asdict(measurement.shape),
        "shaped": measurement.shaped,
        "rounds": arguments.rounds,
        "rows": measurement.rows,
        "memory": measurement.memory,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "exchange.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (arguments.out / "exchange.md").write_text(text)
    _say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
