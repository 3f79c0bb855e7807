"""Turn answers into text tables and plain data for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from msa_train.simulate.costs.layer_costs import SchemeReport
from msa_train.simulate.study import Answer, ScalePoint

LEFT_OUT = (
    "everything but the attention block of a layer: experts, norms, residuals, optimizer, data",
    "congestion inside the network: every rank's links are its own, nothing else uses them",
    "computing that slows down while a collective runs beside it (its share of cores and memory)",
    "variation: ranks are equally fast, collectives take the same time every time",
    "early ends: a collective ends on all its ranks at once, an uneven all-to-all too",
    "kernel rates that depend on sizes: one rate per kernel, whatever the number of blocks or tokens",
)
"what the model does not have"

_COLUMNS = (
    "scheme", "recv MB", "max recv", "max sent", "max far", "wire ms", "exposed ms", "imbalance ms", "fwd ms",
    "bwd ms", "layer ms", "memory MB",
)  # fmt: skip


def answer_data(answer: Answer) -> dict[str, Any]:
    """Return everything of an answer, ready for JSON: bytes, seconds."""
    scenario = answer.scenario
    return {
        "scenario": {
            "seq_len": scenario.seq_len,
            "cp_size": scenario.cp_size,
            "layout": scenario.layout,
            "num_docs": 1 if scenario.cu_seqlens is None else len(scenario.cu_seqlens) - 1,
            "index_balance": scenario.index_balance,
            "shape": asdict(scenario.shape),
            "cluster": asdict(scenario.cluster),
            "rates": {
                "name": scenario.rates.name,
                "kind": scenario.rates.kind,
                "device": scenario.rates.device,
            },
            "options": asdict(scenario.options),
        },
        "selections": answer.selections,
        "f": answer.f,
        "local_share": answer.local_share,
        "index_work_max_over_mean": answer.index_balance,
        "msa": {name: report_data(report) for name, report in answer.msa.items()},
        "full": {name: report_data(report) for name, report in answer.full.items()},
    }


def report_data(report: SchemeReport) -> dict[str, Any]:
    """Return one scheme's report, ready for JSON: bytes per rank, seconds."""
    total, received, sent = report.total, report.received, report.sent
    return {
        "chosen": report.chosen.value if report.chosen else None,
        "received_bytes_mean": float(received.mean()),
        "received_bytes_max": float(received.max()),
        "sent_bytes_max": float(sent.max()),
        "far_bytes_max": float(report.far.max()),
        "received_bytes_mean_by_purpose": {
            # a purpose may take several collectives: gather and scatter of broadcast blocks, both hops
            name: float(np.sum([wire.received.mean() for wire in wires]))
            for name, wires in report.traffic.items()
        },
        "forward_s": report.forward.total,
        "backward_s": report.backward.total,
        "layer_s": total.total,
        "compute_s": total.compute,
        "copying_s": total.copying,
        "imbalance_s": total.imbalance,
        "exposed_s": total.exposed,
        "exposed_s_by_purpose": total.exposed_by,
        "wire_s": sum(total.wire.values()),
        "memory_bytes": report.memory_bytes,
    }


def answer_text(answer: Answer) -> str:
    """Return the tables of an answer: MB per rank, ms."""
    scenario = answer.scenario
    docs = 1 if scenario.cu_seqlens is None else len(scenario.cu_seqlens) - 1
    head_size = scenario.options.head_size
    # the first lines say what was asked, so that a table can be read without its command
    lines = [
        f"{tokens_text(scenario.seq_len)} tokens in {docs} document{'s' * (docs > 1)}, cp_size "
        f"{scenario.cp_size}"
        + (f" (cp_head_size {head_size})" if head_size > 1 else "")
        + f", layout {scenario.layout}, cluster {scenario.cluster.name}, rates {scenario.rates.name} "
        f"({scenario.rates.kind})",
        f"selections: {answer.selections}",
        f"f {answer.f:.3f}, local share {answer.local_share:.3f}, largest index work / mean "
        f"{answer.index_balance:.3f}",
        "",
    ]
    for kind, reports in (("MSA layer", answer.msa), ("full-attention layer", answer.full)):
        if reports:
            lines += [kind, *table([_COLUMNS, *(_row(name, report) for name, report in reports.items())]), ""]
    return "\n".join(lines)


def _row(name: str, report: SchemeReport) -> tuple[str, ...]:
    total = report.total
    label = f"{name} = {report.chosen.value}" if report.chosen else name
    return (
        label,
        *(
            _mega(x)
            for x in (report.received.mean(), report.received.max(), report.sent.max(), report.far.max())
        ),
        *(
            _milli(x)
            for x in (
                sum(total.wire.values()),
                total.exposed,
                total.imbalance,
                report.forward.total,
                report.backward.total,
                total.total,
            )
        ),
        _mega(report.memory_bytes),
    )


def scaling_data(points: Sequence[ScalePoint]) -> list[dict[str, Any]]:
    """Return a curve, ready for JSON."""
    return [asdict(point) for point in points]


def scaling_text(points: Sequence[ScalePoint], *, weak: bool) -> str:
    """Return a curve with a title."""
    title = "weak scaling, tokens per rank fixed" if weak else "strong scaling, sequence fixed"
    return "\n".join([f"speed kept from {points[0].cp_size} ranks on ({title})", *scaling_table(points), ""])


def scaling_table(points: Sequence[ScalePoint]) -> list[str]:
    """Return the speed kept per scheme as table lines."""
    names = list(points[0].kept)
    rows = [("cp_size", "tokens", "f", *names)]
    for point in points:
        kept = (f"{100 * point.kept[name]:.0f}%" for name in names)
        rows.append((str(point.cp_size), tokens_text(point.seq_len), f"{point.f:.3f}", *kept))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return Markdown lines: the first row is the head, the first column is text, the others are numbers."""
    # a rule of Markdown needs a dash beside its colon
    widths = [max(2, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])]


def tokens_text(tokens: int) -> str:
    """Shorten a number of tokens: 196608 -> 192K, 1048576 -> 1M, 1000 -> 1000."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def _mega(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _milli(seconds: float) -> str:
    # a difference of clocks that agree may be a rounding error away from 0
    return f"{max(seconds, 0.0) * 1e3:,.2f}"
