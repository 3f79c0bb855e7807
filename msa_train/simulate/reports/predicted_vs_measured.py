"""Compare predicted with measured times of the wire benchmark (benchmarks/exchange).

A step there is the attention of one MSA layer, forward and backward, without projections and selection. The
comparison asks if bytes, rates, waiting and overlap add up to the step, so what computing took is taken from
the measurement, row by row: processor time over own and over other blocks (`sources_cpu_s_mean`), the rest of
`compute_cpu_s`, and what moving bytes took beside it (`process_cpu_s`). Processors of the benchmark are few,
and serve the links as well: the same computing takes up to half as long again while bytes arrive. Limited
rates come from the benchmark's settings, bytes from the planner, the share of headers from steps without a
limit.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.selection_file import Bits
from msa_train.simulate.costs.demand import collect_wants
from msa_train.simulate.costs.layer_costs import LayerCosts, SchemeReport
from msa_train.simulate.costs.msa_exchange import AttentionWork, PassWork
from msa_train.simulate.costs.msa_layer import MsaLayer, MsaWork
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.inputs.rates import KernelRates, load_rates
from msa_train.simulate.inputs.scenario import Options, Scheme
from msa_train.simulate.inputs.settings_file import read_mapping
from msa_train.simulate.reports.text import table

GOAL = 0.15
"largest error of a predicted time that the project wants"
REFERENCE = "all_gather"
MBIT = 1e6 / 8
# Messages over gloo's sockets between processes of one machine; measured times there have milliseconds
LATENCY_S = 2e-4
# Slots of a query in the benchmark's constructed selections that its own rank serves
LOCAL_SLOTS = 2
_NEVER = 1e30


@dataclass(slots=True, frozen=True)
class _Known:
    """Hold the model's name of a scheme of the benchmark."""

    scheme: Scheme
    "of the model"
    options: Options
    "with which the benchmark runs it"


SCHEMES = {
    "all_gather": _Known(Scheme.all_gather, Options()),
    "all_gather_all_reduce": _Known(Scheme.all_gather_all_reduce, Options()),
    "ring": _Known(Scheme.ring, Options()),
    "selected": _Known(Scheme.selected, Options()),
    "selected_no_hot": _Known(Scheme.selected, Options(hot_share=0.0)),
    "selected_again": _Known(Scheme.selected, Options(keep_for_backward=False)),
    "selected_by_node": _Known(Scheme.selected_hierarchical, Options()),
    "auto": _Known(Scheme.auto, Options()),
}
"the benchmark's names"
Row = dict[str, Any]


@dataclass(slots=True)
class Comparison:
    """Compare one measured row with its prediction.

    Example: measured 2 s, predicted 2.2 s -> error 0.1.
    """

    part: str
    "number of ranks, as the benchmark names it"
    rate_mbit: int
    "limit of each rank's link, Mbit/s"
    node_rate_mbit: int
    "limit of each node's link, Mbit/s; 0: one node"
    scheme: str
    "the benchmark's name"
    selection: str
    "the benchmark's name, e.g. trained"
    f: float
    "share of remote KV blocks selected, 0 to 1"
    measured_s: float
    "median step, s"
    predicted_s: float
    "modelled step, s"
    error: float
    "predicted / measured - 1"
    counted_bytes: float
    "received, counted by the collectives, sum over ranks"
    predicted_bytes: float
    "received in the model, sum over ranks"


@dataclass(slots=True)
class GivenKvBlocks:
    """Make up selections of which only the numbers of KV blocks are known, by drawing evenly."""

    pairs: NDArray[np.int64]
    "[P, P] KV blocks by requester and owner"
    num_kv_heads: int
    "M"
    share: float
    "of the (query, block) pairs, the share that a rank with remote ones serves itself, 0 to 1"

    def needed(self, placement: Placement, rank: int) -> Bits:
        """See Selections.needed."""
        rng = np.random.default_rng(rank)
        needed = np.zeros((self.num_kv_heads, placement.num_blocks), dtype=bool)
        local = placement.order.shape[1]
        for owner, count in enumerate(self.pairs[rank]):
            # KV block n of an owner: KV head n // NL, its block n % NL
            drawn = rng.permutation(self.num_kv_heads * local)[:count]
            needed[drawn // local, placement.order[owner][drawn % local]] = True
        return needed

    def local_share(self, placement: Placement) -> NDArray[np.float64]:
        """See Selections.local_share."""
        return np.where(self.pairs.sum(axis=1) > 0, self.share, 1.0)

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
    result = read_mapping(path)
    missing = [name for name in ("shape", "machine", "selections", "rows") if name not in result]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing; name a result of benchmarks/exchange")
    rates = None if rates_name is None else load_rates(rates_name)
    rows = [row for row in result["rows"] if row["rate_mbit"] and row["scheme"] in SCHEMES]
    if not rows:
        raise ValueError(f"{path}: has no row with a limited rate; run the benchmark without --unshaped")
    try:
        return [_compare(row, result, rates, path) for row in rows]
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing; name a result of benchmarks/exchange") from error


def _compare(row: Row, result: dict[str, Any], rates: KernelRates | None, path: Path) -> Comparison:
    # the reference row without a limit tells the share of headers, on the same ranks and selection
    same = [r for r in result["rows"] if r["part"] == row["part"] and r["selection"] == row["selection"]]
    free = [r for r in same if not r["rate_mbit"] and r["scheme"] == REFERENCE]
    case = [c for c in result["selections"] if (c["part"], c["selection"]) == (row["part"], row["selection"])]
    if not free or not case:
        raise ValueError(
            f"{path}: part {row['part']}, selection {row['selection']} has no {REFERENCE} without a limit; "
            "run the benchmark with its default schemes"
        )
    cores = int(result["machine"]["cores"])
    report = predict(row, free[0], case[0], cores, rates)
    # what waiting leaves free of the processors, moving bytes may use: only then does it cost nothing
    predicted_s = max(report.total.total, float(np.sum(row["process_cpu_s"])) / cores)
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


def predict(row: Row, free: Row, case: Row, cores: int, rates: KernelRates | None = None) -> SchemeReport:
    """Model the step of a row.

    Args:
        row: a measured row with limited rates.
        free: the reference scheme without a limit, same ranks and selection.
        case: the selection: sizes and who fetched how many KV blocks from whom.
        cores: of the machine, shared by all ranks.
        rates: kernel rates; None: the row's processor times.
    """
    pairs, shape = np.asarray(case["pairs"], dtype=np.int64), _shape(case)
    size, known = pairs.shape[0], SCHEMES[row["scheme"]]
    placement = place("contiguous", seq_len=case["seq_len"], block_size=shape.block_size, cp_size=size)
    setup = LayerCosts(
        shape=shape,
        cluster=_cluster(row, free, cores, size),
        rates=rates or _rates(row),
        cp_size=size,
        options=known.options,
        outer=placement,
    )
    given = GivenKvBlocks(pairs, shape.num_kv_heads, min(1.0, LOCAL_SLOTS / shape.topk))
    work = MsaWork(
        tiles=np.full(size, placement.local_seq_len * shape.topk, dtype=np.int64),
        wants=collect_wants(given, placement, shape.num_kv_heads, 1),
        local_share=given.local_share(placement),
        index_scores=np.zeros(size, dtype=np.int64),
        index_moved=np.zeros((size, size), dtype=np.int64),
    )
    attention = _attention(row, setup) if rates is None else None
    layer = MsaLayer(setup, work, attention=attention, with_projections=False)
    if known.scheme is not Scheme.auto:
        return layer.report(known.scheme)
    # which way auto went is data of the measurement: its rates were measured there and then
    return layer.report_auto(selected=row["used"] == Scheme.selected.value)


def _attention(row: Row, setup: LayerCosts) -> AttentionWork:
    """Take the seconds that the row's ranks computed, on their share of the cores."""
    # processor seconds on 1 / n of a core take n times as long on the clock
    seconds = {
        name: np.full(setup.cp_size, value / setup.cluster.compute_share)
        for name, value in row["sources_cpu_s_mean"].items()
    }
    return AttentionWork(
        PassWork(seconds["forward_own"], seconds["forward_others"]),
        PassWork(seconds["backward_own"], seconds["backward_others"]),
    )


def _shape(values: Row) -> LayerShape:
    groups = int(values["num_kv_heads"])
    return LayerShape(
        # there are no projections in the benchmark's step
        hidden_size=1,
        num_heads=groups * int(values["heads_per_group"]),
        num_kv_heads=groups,
        head_dim=int(values["head_dim"]),
        index_head_dim=int(values["index_head_dim"]),
        block_size=int(values["block_size"]),
        topk=int(values["topk"]),
        element_bytes=int(values["bytes_per_element"]),
        trains_index=bool(values["with_kl"]),
    )


def _cluster(row: Row, free: Row, cores: int, size: int) -> Cluster:
    """Describe the benchmark's namespaces: one link per rank, nodes joined by a link that they share."""
    nodes = 2 if row["node_rate_mbit"] else 1
    received = float(np.sum(free["interface_received_bytes"]))
    counted = float(np.sum(free["counted_bytes"]))
    # processor time that is not computing went into moving bytes: system calls, copies, headers
    moving = np.sum(row["process_cpu_s"]) - np.sum(row["compute_cpu_s"])
    # 4 ranks on 2 cores compute at half speed each
    share = min(1.0, cores / size)
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
        host_s_per_byte=max(0.0, float(moving)) / max(float(np.sum(row["counted_bytes"])), 1.0),
        compute_share=share,
        source="benchmarks/exchange",
    )


def _rates(row: Row) -> KernelRates:
    """Make rates by which nothing takes time; what the row computed beside attention comes first."""
    beside = float(np.mean(row["compute_cpu_s"])) - sum(row["sources_cpu_s_mean"].values())
    return KernelRates(
        name="measured",
        kind="measured",
        device="",
        projection_flops=_NEVER,
        index_flops=_NEVER,
        sparse_forward_flops=_NEVER,
        sparse_backward_flops=_NEVER,
        kl_flops=_NEVER,
        full_forward_flops=_NEVER,
        full_backward_flops=_NEVER,
        copy_bytes=_NEVER,
        layer_overhead_s=max(0.0, beside),
    )


def comparison_data(rows: list[Comparison]) -> dict[str, Any]:
    """Return the rows and the worst error as plain data for JSON."""
    return {"goal": GOAL, "worst_error": _worst(rows).error, "rows": [asdict(row) for row in rows]}


def comparison_text(rows: list[Comparison]) -> str:
    """Return a table, and a line about the farthest prediction."""
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
            f"{within} of {len(rows)} within {100 * GOAL:.0f}%; the farthest is {100 * worst.error:+.0f}% "
            f"({worst.scheme}, {worst.part} ranks, {worst.rate_mbit} Mbit/s, f {worst.f:.3f}). bytes: "
            "predicted / counted by the collectives.",
        ]
    )


def _worst(rows: list[Comparison]) -> Comparison:
    return max(rows, key=lambda row: abs(row.error))
