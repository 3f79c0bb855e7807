"""Runs parts of the benchmark and collects their figures."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.exchange.cluster import Cluster, RankError
from benchmarks.exchange.formulas import LayerShape
from benchmarks.exchange.layer import expected_bytes, make_layer
from benchmarks.exchange.namespaces import Rates
from benchmarks.exchange.rank import StepReport
from benchmarks.exchange.schemes import REFERENCE, SCHEMES

# Worst row of any output or gradient, relative to its size: fp32 sums in another order.
TOLERANCE = 2e-5
MEMORY_SCALE = 4
"memory is measured with a longer sequence, so that buffers outweigh what a process needs anyway"


@dataclass(slots=True, frozen=True)
class Part:
    """Ranks and their links. nodes: bridges; rates: one after the other."""

    name: str
    ranks: int
    nodes: int
    rates: tuple[Rates, ...]


def make_part(name: str, rates: list[int], node_rates: list[int]) -> Part:
    """Example: "8" -> 8 ranks, at each rate; "2x4" -> two nodes of 4 ranks.

    Raises:
        ValueError: if the name is neither.
    """
    nodes, cross, ranks = name.rpartition("x")
    if not ranks.isdigit() or int(ranks) < 1 or (cross and nodes != "2"):
        raise ValueError(f"--parts {name}: must be a number of ranks, or 2xN for two nodes of N ranks")
    if cross:
        return Part(name, 2 * int(ranks), 2, (Rates(rank=node_rates[0], nodes=node_rates[1]),))
    return Part(name, int(ranks), 1, tuple(Rates(rank=rate) for rate in rates))


class Measurement:
    """Runs parts and collects rows."""

    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.say = say
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
                    self.say(_line(where, rows))

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
                self.say(f"memory, {part.name} ranks, f {selection}, {scheme}: {max(peaks) / 2**20:.0f} MiB")

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
        between = dict.fromkeys(self.schemes, 0)
        for _ in range(self.rounds):
            for scheme in self.schemes:
                before = cluster.between_nodes()
                steps[scheme].append(cluster.call("step", selection, scheme, False))
                between[scheme] += cluster.between_nodes() - before
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
                "formula_by_purpose_mean": _mean_by_purpose(expected),
                "between_nodes_bytes": between[scheme] / self.rounds,
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
        "step_s_median": statistics.median(walls),
        "step_s_min": min(walls),
        "compute_cpu_s": mean_by_rank("compute_s"),
        "process_cpu_s": mean_by_rank("process_cpu_s"),
        "counted_bytes": [sum(report.traffic.values()) for report in last],
        "counted_by_purpose_mean": _mean_by_purpose([report.traffic for report in last]),
        "interface_received_bytes": [c[0] for c in counters],
        "interface_sent_bytes": [c[2] for c in counters],
        "interface_packets": [c[1] + c[3] for c in counters],
        "retransmits": sum(report.retransmits for step in steps for report in step),
    }


def _mean_by_purpose(by_rank: list[dict[str, int]]) -> dict[str, float]:
    purposes = dict.fromkeys(purpose for one in by_rank for purpose in one)
    return {p: sum(one.get(p, 0) for one in by_rank) / len(by_rank) for p in purposes}


def _line(where: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    times = "  ".join(f"{row['scheme']} {row['step_s_median']:.3f}" for row in rows)
    rate = f"{where['rate_mbit']} Mbit/s" if where["rate_mbit"] else "no limit"
    between = f" ({where['node_rate_mbit']} between nodes)" if where["node_rate_mbit"] else ""
    first = rows[0]
    return (
        f"{where['part']} ranks, {rate}{between}, f {first['f']:.3f} ({first['selection']}): {times} s/step"
    )
