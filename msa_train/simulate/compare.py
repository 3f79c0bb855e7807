"""Predicted against measured times of the wire benchmark (benchmarks/exchange).

A step there is the attention of one MSA layer, forward and backward, without projections and selection. What
the prediction takes from the measurement are figures of the machine, all from steps without a rate limit: the
processor time that computing took (`compute_cpu_s`), and the processor time of moving a byte, and the share of
headers. Limited rates come from the benchmark's settings, bytes from the planner.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.cluster import Cluster
from msa_train.simulate.files import read_mapping
from msa_train.simulate.layouts import place
from msa_train.simulate.msa_layer import MsaLayer, MsaWork
from msa_train.simulate.placement import Placement
from msa_train.simulate.question import Options, Scheme
from msa_train.simulate.rates import KernelRates
from msa_train.simulate.replay import collect_wants
from msa_train.simulate.report import table
from msa_train.simulate.selections import Bits
from msa_train.simulate.setup import SchemeReport, Setup
from msa_train.simulate.shape import BACKWARD_FACTOR, LayerShape

GOAL = 0.15
"largest error of a predicted time that the project wants"
REFERENCE = "all_gather"
MBIT = 1e6 / 8
# Messages over gloo's sockets between processes of one machine; measured times there have milliseconds
LATENCY_S = 2e-4
# Slots of a query in the benchmark's constructed selections that its own rank serves
LOCAL_SLOTS = 2
_NEVER = 1e30
Row = dict[str, Any]


@dataclass(slots=True)
class Comparison:
    """One measured row. error: predicted / measured - 1; bytes are sums over ranks."""

    part: str
    rate_mbit: int
    node_rate_mbit: int
    scheme: str
    selection: str
    f: float
    measured_s: float
    predicted_s: float
    error: float
    counted_bytes: float
    predicted_bytes: float


@dataclass(slots=True)
class GivenPairs:
    """Selections of which only the number of fetched pairs per rank is known; which ones is drawn evenly.

    fetched: [P]. earlier: only blocks before the rank's, as a trained model selects; else all remote ones.
    """

    fetched: list[int]
    num_kv_heads: int
    share: float
    earlier: bool

    def needed(self, placement: Placement, rank: int) -> Bits:
        """See Selections.needed."""
        rng = np.random.default_rng(rank)
        own = placement.order[rank]
        candidates = np.flatnonzero(placement.owner != rank)
        if self.earlier:
            candidates = candidates[candidates < own[-1]]
        needed = np.zeros((self.num_kv_heads, placement.num_blocks), dtype=bool)
        for group in range(self.num_kv_heads):
            count = self.fetched[rank] // self.num_kv_heads + (
                group < self.fetched[rank] % self.num_kv_heads
            )
            needed[group, rng.permutation(candidates)[:count]] = True
        return needed

    def local_share(self, placement: Placement) -> NDArray[np.float64]:
        """See Selections.local_share."""
        return np.where(np.asarray(self.fetched) > 0, self.share, 1.0)

    def describe(self) -> str:
        """See Selections.describe."""
        return "as many pairs as were fetched, drawn evenly"


def compare_file(path: Path, rates_name: str | None = None) -> list[Comparison]:
    """Predict every measured row with a limited rate.

    Args:
        path: the benchmark's JSON.
        rates_name: kernel rates to use instead of the measured processor times.

    Raises:
        ValueError: if the file is no result of the benchmark, or lacks steps without a limit.
    """
    from msa_train.simulate.rates import load_rates

    result = read_mapping(path)
    missing = [name for name in ("shape", "machine", "rows") if name not in result]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing; name a result of benchmarks/exchange")
    rates = None if rates_name is None else load_rates(rates_name)
    known = {scheme.value for scheme in Scheme}
    rows = [row for row in result["rows"] if row["rate_mbit"] and _scheme_name(row) in known]
    if not rows:
        raise ValueError(f"{path}: has no row with a limited rate; run the benchmark without --unshaped")
    return [_compare(row, result, rates, path) for row in rows]


def _compare(row: Row, result: dict[str, Any], rates: KernelRates | None, path: Path) -> Comparison:
    free = [
        other
        for other in result["rows"]
        if other["part"] == row["part"]
        and other["selection"] == row["selection"]
        and not other["rate_mbit"]
        and other["scheme"] == REFERENCE
    ]
    if not free:
        raise ValueError(
            f"{path}: part {row['part']}, selection {row['selection']} has no {REFERENCE} without a limit; run "
            "the benchmark with its default schemes"
        )
    report = predict(row, free[0], result, rates)
    predicted_s = report.total.total
    return Comparison(
        part=row["part"],
        rate_mbit=row["rate_mbit"],
        node_rate_mbit=row["node_rate_mbit"],
        scheme=row["scheme"],
        selection=row["selection"],
        f=row["f"],
        measured_s=row["step_s_median"],
        predicted_s=predicted_s,
        error=predicted_s / row["step_s_median"] - 1,
        counted_bytes=float(sum(row["counted_bytes"])),
        predicted_bytes=float(report.received.sum()),
    )


def predict(row: Row, free: Row, result: dict[str, Any], rates: KernelRates | None) -> SchemeReport:
    """The modelled step of a row.

    Args:
        row: a measured row with limited rates.
        free: the reference scheme without a limit, same ranks and selection.
        result: the whole file.
        rates: kernel rates; None: from `free`.
    """
    size = len(row["fetched"])
    shape = _shape(result["shape"], row)
    placement = place("contiguous", seq_len=_seq_len(result, row), block_size=shape.block_size, cp_size=size)
    cluster = _cluster(row, free, result, size)
    setup = Setup(
        shape=shape,
        cluster=cluster,
        rates=rates or _rates(shape, placement, free),
        cp_size=size,
        options=Options(hot_share=float(row.get("hot_share", Options().hot_share))),
        outer=placement,
    )
    share = min(1.0, LOCAL_SLOTS / shape.topk)
    given = GivenPairs(row["fetched"], shape.num_kv_heads, share, earlier=row["selection"] == "trained")
    work = MsaWork(
        wants=collect_wants(given, placement, shape.num_kv_heads, 1),
        local_share=given.local_share(placement),
        index_scores=np.zeros(size, dtype=np.int64),
        index_moved=np.zeros((size, size), dtype=np.int64),
    )
    return MsaLayer(setup, work, with_projections=False).report(Scheme(_scheme_name(row)))


def _scheme_name(row: Row) -> str:
    return str(row["scheme"])


def _seq_len(result: dict[str, Any], row: Row) -> int:
    return int(row.get("seq_len", result["shape"]["seq_len"]))


def _shape(values: dict[str, Any], row: Row) -> LayerShape:
    """The benchmark's shape; a row of a recorded selection has its own block size and slots."""
    groups = int(values["num_kv_heads"])
    return LayerShape(
        hidden_size=1,
        num_heads=groups * int(values["heads_per_group"]),
        num_kv_heads=groups,
        head_dim=int(values["head_dim"]),
        index_head_dim=int(values["index_head_dim"]),
        block_size=int(row.get("block_size", values["block_size"])),
        topk=int(row.get("topk", values["topk"])),
        element_bytes=int(values["bytes_per_element"]),
        trains_index=bool(values["with_kl"]),
    )


def _cluster(row: Row, free: Row, result: dict[str, Any], size: int) -> Cluster:
    """The namespaces of the benchmark: one link per rank, nodes joined by a link that they share."""
    nodes = 2 if row["node_rate_mbit"] else 1
    received = float(np.sum(free["interface_received_bytes"]))
    counted = float(np.sum(free["counted_bytes"]))
    moving = np.sum(free["process_cpu_s"]) - np.sum(free["compute_cpu_s"])
    share = min(1.0, float(result["machine"]["cores"]) / size)
    return Cluster(
        name="namespaces",
        gpus_per_node=size // nodes,
        node_rate_bytes=row["rate_mbit"] * MBIT,
        network_rate_bytes=row["rate_mbit"] * MBIT,
        node_uplink_bytes=row["node_rate_mbit"] * MBIT,
        one_link=True,
        node_latency_s=LATENCY_S,
        network_latency_s=LATENCY_S,
        host_sync_s=0.0,
        # headers, and acknowledgements of what goes the other way
        link_efficiency=min(1.0, counted / received) if received > counted else 1.0,
        multi_rail_collectives=False,
        host_s_per_byte=max(0.0, float(moving)) / max(counted, 1.0),
        compute_share=share,
        source="benchmarks/exchange",
    )


def _rates(shape: LayerShape, placement: Placement, free: Row) -> KernelRates:
    """Rates with which the attention takes the measured processor time, split by FLOPs; nothing else takes any."""
    tiles = float(placement.tiles(shape.topk).mean())
    forward = shape.sparse_flops(tiles)
    backward = BACKWARD_FACTOR * forward + (shape.kl_flops(tiles) if shape.trains_index else 0.0)
    rate = (forward + backward) / max(float(np.mean(free["compute_cpu_s"])), 1e-9)
    return KernelRates(
        name="measured",
        kind="measured",
        device="",
        projection_flops=_NEVER,
        index_flops=_NEVER,
        sparse_forward_flops=rate,
        sparse_backward_flops=rate,
        kl_flops=rate,
        full_forward_flops=_NEVER,
        full_backward_flops=_NEVER,
        copy_bytes=_NEVER,
        layer_overhead_s=0.0,
    )


def comparison_data(rows: list[Comparison]) -> dict[str, Any]:
    """For JSON."""
    return {"goal": GOAL, "worst_error": _worst(rows).error, "rows": [asdict(row) for row in rows]}


def comparison_text(rows: list[Comparison]) -> str:
    """A table, and the farthest prediction."""
    head = ("scheme", "ranks", "Mbit/s", "between", "f", "measured s", "predicted s", "error", "bytes")
    cells = [
        (
            row.scheme,
            row.part,
            str(row.rate_mbit),
            str(row.node_rate_mbit or "-"),
            f"{row.f:.3f}" + (" trained" if row.selection == "trained" else ""),
            f"{row.measured_s:.3f}",
            f"{row.predicted_s:.3f}",
            f"{100 * row.error:+.0f}%",
            f"{row.predicted_bytes / row.counted_bytes:.3f}",
        )
        for row in rows
    ]
    worst, within = _worst(rows), sum(abs(row.error) <= GOAL for row in rows)
    return "\n".join(
        [
            *table([head, *cells]),
            "",
            f"{within} of {len(rows)} within {100 * GOAL:.0f}%; the farthest is {100 * worst.error:+.0f}% ({worst.scheme}, "
            f"{worst.part} ranks, {worst.rate_mbit} Mbit/s, f {worst.f:.3f}). bytes: predicted / counted by the collectives.",
        ]
    )


def _worst(rows: list[Comparison]) -> Comparison:
    return max(rows, key=lambda row: abs(row.error))
