"""Run parts of the benchmark and collect their figures."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.exchange.cluster import Cluster, RankError
from benchmarks.exchange.formulas import LayerShape
from benchmarks.exchange.layer import expected_bytes
from benchmarks.exchange.namespaces import Rates
from benchmarks.exchange.rank import StepReport
from benchmarks.exchange.schemes import REFERENCE, SCHEMES
from benchmarks.exchange.selections import shape_for

# Worst row of any output or gradient, relative to its size: fp32 sums in another order.
TOLERANCE = 2e-5
MEMORY_SCALE = 4
"memory is measured with a longer sequence, so that buffers outweigh what a process needs anyway"


@dataclass(slots=True, frozen=True)
class Part:
    """Describe ranks and their links."""

    name: str
    "as on the command line, e.g. 8 or 2x4"
    ranks: int
    "of all nodes together"
    nodes: int
    "1 or 2, each a bridge"
    rates: tuple[Rates, ...]
    "measured one after the other, after links without a limit"


def make_part(name: str, rates: list[int], node_rates: list[int]) -> Part:
    """Read the name of a part.

    Args:
        name: ranks, or 2xN for two nodes.
        rates: Mbit/s of each rank's link, for one node.
        node_rates: Mbit/s of each rank's link and of the one between the nodes, for two.

    Example: "8" -> 8 ranks, at each rate; "2x4" -> two nodes of 4 ranks.

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
    """Run parts and collect rows.

    rows: a scheme, selection and rate each. pairs: who fetches how many pairs from whom, by part and
    selection. rates: what `auto` measured, by part and rate. memory: peaks.
    """

    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.say = say
        self.shape = LayerShape(seq_len=arguments.seq_len, with_kl=not arguments.no_kl)
        self.selections: list[str] = arguments.selections
        self.schemes: list[str] = [REFERENCE, *(s for s in arguments.schemes if s != REFERENCE)]
        self.rounds, self.shaped = arguments.rounds, not arguments.unshaped
        self.timeout_s: float = arguments.timeout_s
        self.rows: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.rates: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []

    def run(self, part: Part) -> None:
        """Measure every selection, rate and scheme of a part."""
        schemes = self._schemes(part)
        with self._cluster(part) as cluster:
            cluster.limit(Rates(rank=0))
            cluster.call("connect", schemes)
            cases = [self._prepare(cluster, part, selection, schemes) for selection in self.selections]
            for rate in (Rates(rank=0), *part.rates):
                cluster.limit(rate)
                where = {"part": part.name, "rate_mbit": rate.rank, "node_rate_mbit": rate.nodes}
                self.rates.append({**where, "measured": cluster.call("calibrate")[0]})
                for case in cases:
                    # Without a limit there is nothing to wait for that could vary; one round less saves time.
                    rounds = self.rounds if rate.rank or self.rounds == 1 else self.rounds - 1
                    rows = self._measure(cluster, case, rounds)
                    self.rows += [{**where, **row} for row in rows]
                    self.say(_line(where, rows))

    def measure_memory(self, part: Part, selection: str) -> None:
        """Measure the peak of one step of each scheme, largest rank."""
        shape = replace(self.shape, seq_len=self.shape.seq_len * MEMORY_SCALE)
        schemes = self._schemes(part)
        with self._cluster(part) as cluster:
            cluster.call("connect", schemes)
            cluster.call("prepare", selection, shape)
            for scheme in schemes:
                peaks: list[int] = cluster.call("memory", selection, scheme)
                row = {"part": part.name, "selection": selection, "seq_len": shape.seq_len}
                self.memory.append({**row, "scheme": scheme, "peak_bytes": peaks})
                self.say(f"memory, {part.name} ranks, f {selection}, {scheme}: {max(peaks) / 2**20:.0f} MiB")

    def _schemes(self, part: Part) -> list[str]:
        return [name for name in self.schemes if part.nodes > 1 or not SCHEMES[name].by_node]

    def _cluster(self, part: Part) -> Cluster:
        return Cluster(part.ranks, num_nodes=part.nodes, shaped=self.shaped, timeout_s=self.timeout_s)

    def _prepare(self, cluster: Cluster, part: Part, selection: str, schemes: list[str]) -> "_Case":
        """Build the data everywhere and make a first step of every scheme, to check its numbers.

        Raises:
            RankError: if they are not the reference's: the time of a wrong result says nothing.
        """
        wanted = torch.from_numpy(np.stack(cluster.call("prepare", selection, self.shape)))
        case = _Case(selection, shape_for(selection, self.shape), wanted, {})
        for scheme in schemes:
            reports: list[StepReport] = cluster.call("step", selection, scheme, True)
            error = max(report.error or 0.0 for report in reports)
            if error > TOLERANCE:
                raise RankError(
                    f"selection {selection}: worst row of {scheme} differs from {REFERENCE} by {error:.1e}, "
                    f"more than {TOLERANCE:.0e}; nothing is reported"
                )
            case.errors[scheme] = error
        pairs = wanted.sum(2).tolist()
        self.pairs.append({"part": part.name, "selection": selection, **asdict(case.shape), "pairs": pairs})
        return case

    def _measure(self, cluster: Cluster, case: "_Case", rounds: int) -> list[dict[str, Any]]:
        """Measure rounds in which the schemes take turns, so that a slow minute of the machine hits all."""
        steps: dict[str, list[list[StepReport]]] = {scheme: [] for scheme in case.errors}
        between = dict.fromkeys(steps, 0)
        for _ in range(rounds):
            for scheme in steps:
                before = cluster.between_nodes()
                steps[scheme].append(cluster.call("step", case.selection, scheme, False))
                between[scheme] += cluster.between_nodes() - before
        rows: list[dict[str, Any]] = []
        for scheme, found in steps.items():
            last = found[-1][0]
            nodes = cluster.size // cluster.num_nodes if last.by_node else 0
            expected = expected_bytes(case.shape, SCHEMES[scheme], last.used, case.wanted, nodes)
            row = {
                "selection": case.selection,
                "f": sum(case.f_by_rank) / cluster.size,
                "f_by_rank": case.f_by_rank,
                "scheme": scheme,
                "used": last.used.value,
                "worst_row_error": case.errors[scheme],
                **summary(found),
                "formula_bytes": [sum(by_purpose.values()) for by_purpose in expected],
                "formula_by_purpose_mean": _mean_by_purpose(expected),
                "between_nodes_bytes": between[scheme] / rounds,
            }
            rows.append(row)
        return rows


@dataclass(slots=True)
class _Case:
    """Hold a selection in a cluster."""

    selection: str
    "its name, see `select`"
    shape: LayerShape
    "of the layer, with the length of what was recorded"
    wanted: torch.Tensor
    "[P, P, NP] bool, pairs by requester and owner"
    errors: dict[str, float]
    "worst row against the reference, by scheme"

    @property
    def f_by_rank(self) -> list[float]:
        """Compute the share of the remote pairs that each rank wants."""
        ranks, _, pairs = self.wanted.shape
        return [count / ((ranks - 1) * pairs) for count in self.wanted.sum((1, 2)).tolist()]


def summary(steps: list[list[StepReport]]) -> dict[str, Any]:
    """Collect the figures of a scheme's steps: by step, then by rank.

    A step lasts as long as its slowest rank, since training waits for that one.
    """
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
        "sources_cpu_s_mean": _mean_by_purpose([report.sources_s for step in steps for report in step]),
        "exposed_s_mean": _mean_by_purpose([report.exposed_s for report in last]),
        "counted_bytes": [sum(report.traffic.values()) for report in last],
        "counted_by_purpose_mean": _mean_by_purpose([report.traffic for report in last]),
        "interface_received_bytes": [c[0] for c in counters],
        "interface_sent_bytes": [c[2] for c in counters],
        "interface_packets": [c[1] + c[3] for c in counters],
        "retransmits": sum(report.retransmits for step in steps for report in step),
    }


def _mean_by_purpose(by_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
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
