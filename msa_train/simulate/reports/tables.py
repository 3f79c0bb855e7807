"""Write the tables of benchmarks/results: M3 at three sizes, several f, two networks, and scaling curves."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from msa_train.simulate.costs.layer_costs import SchemeReport
from msa_train.simulate.inputs.cluster import PRESETS
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.rates import KernelRates, load_rates
from msa_train.simulate.inputs.scenario import FullScheme, Options, Scenario, Scheme
from msa_train.simulate.reports.text import (
    LEFT_OUT,
    answer_data,
    scaling_data,
    scaling_table,
    table,
    tokens_text,
)
from msa_train.simulate.selections.recorded import Selections
from msa_train.simulate.selections.synthetic import SyntheticSelections
from msa_train.simulate.study import Answer, ScalePoint, answer, scaling

COMMAND = "msa-simulate tables --out benchmarks/results"
SIZES = ((192 * 2**10, 16), (2**20, 64), (4 * 2**20, 256))
SHARES = (0.05, 0.2, 0.5)
CLUSTERS = ("h100", "h100_100g")
RATES = "h100_assumed"
HEAD_SIZE, QUERY_SLICES = 4, 4
# Scaling: tokens per rank (weak), sequence (strong), and how neighbouring queries agree
WEAK_TOKENS, WEAK_SIZES = 8192, (16, 64, 256, 1024)
STRONG_TOKENS, STRONG_SIZES = 2**20, (16, 64, 256, 1024)
ALIKE_TOKENS = 128

Progress = Callable[[str], None]


def write_tables(folder: Path, shape: LayerShape, say: Progress = print) -> list[Path]:
    """Compute everything and write simulate.json and simulate.md.

    Runs 2 clusters * 3 sizes * 3 values of f, each also in slices of queries with and without Ulysses groups,
    and 2 * 2 scaling curves of 5 sizes up to 1,024 ranks, on one core.

    Args:
        folder: gets the files.
        shape: a layer of M3.
        say: is told what is done.
    """
    rates, start = load_rates(RATES), time.monotonic()
    answers: list[Answer] = []
    sliced_answers: list[Answer] = []
    for name in CLUSTERS:
        for seq_len, cp_size in SIZES:
            for f in SHARES:
                scenario = Scenario(
                    shape=shape, cluster=PRESETS[name], rates=rates, seq_len=seq_len, cp_size=cp_size
                )
                if f != SHARES[0]:
                    # full-attention layers do not depend on f
                    scenario.full_schemes = []
                answers.append(answer(scenario, _stated(shape, f)))
                # the same in slices of queries, without and with Ulysses groups
                for head_size in (1, HEAD_SIZE):
                    sliced = replace(
                        scenario,
                        options=Options(head_size=head_size, query_slices=QUERY_SLICES),
                        schemes=[Scheme.selected, Scheme.selected_hierarchical, Scheme.auto],
                        full_schemes=[],
                    )
                    sliced_answers.append(answer(sliced, _stated(shape, f)))
                say(f"{name}, {tokens_text(seq_len)} on {cp_size}, f {f}: {time.monotonic() - start:.0f} s")
    curves = _curves(shape, rates, say)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "command": COMMAND,
        "commit": _commit(),
        "seconds": time.monotonic() - start,
        "left_out": LEFT_OUT,
        "rates": {"name": rates.name, "kind": rates.kind, "sources": rates.sources},
        "clusters": {name: PRESETS[name].source for name in CLUSTERS},
        "answers": [answer_data(a) for a in answers],
        "answers_sliced": [answer_data(a) for a in sliced_answers],
        "scaling": {
            name: {way: scaling_data(points) for way, points in both.items()} for name, both in curves.items()
        },
    }
    paths = [folder / "simulate.json", folder / "simulate.md"]
    paths[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(data, answers, sliced_answers, curves, rates), encoding="utf-8")
    return paths


def _stated(shape: LayerShape, f: float) -> Selections:
    return SyntheticSelections(
        num_kv_heads=shape.num_kv_heads, topk=shape.topk, local_blocks=shape.local_blocks, f=f
    )


def _curves(shape: LayerShape, rates: KernelRates, say: Progress) -> dict[str, dict[str, list[ScalePoint]]]:
    """Follow weak and strong scaling on every cluster."""
    curves: dict[str, dict[str, list[ScalePoint]]] = {}
    schemes = [s for s in Scheme if s is not Scheme.all_gather_early]

    def behaving(scenario: Scenario) -> Selections:
        return SyntheticSelections(
            num_kv_heads=shape.num_kv_heads,
            topk=shape.topk,
            local_blocks=shape.local_blocks,
            alike_tokens=ALIKE_TOKENS,
        )

    for name in CLUSTERS:
        curves[name] = {}
        for way, seq_len, sizes in (
            ("weak", WEAK_TOKENS * 8, WEAK_SIZES),
            ("strong", STRONG_TOKENS, STRONG_SIZES),
        ):
            scenario = Scenario(
                shape=shape,
                cluster=PRESETS[name],
                rates=rates,
                seq_len=seq_len,
                cp_size=8,
                schemes=schemes,
                full_schemes=[],
            )
            curves[name][way] = scaling(scenario, behaving, sizes, weak=way == "weak")
            say(f"{name}, {way} scaling")
    return curves


def _markdown(
    data: dict[str, Any],
    answers: list[Answer],
    sliced_answers: list[Answer],
    curves: dict[str, dict[str, list[ScalePoint]]],
    rates: KernelRates,
) -> str:
    lines = [
        "# One attention layer of M3 on clusters that were not at hand",
        "",
        f"`{data['command']}`, commit {data['commit']}, {data['seconds']:.0f} s on one core. **No time "
        "here was measured.** Bytes are exact counts of the exchange's own planner for made-up "
        "selections; times are bytes over link rates and FLOPs over kernel rates. All kernel rates are "
        f"assumptions (`{rates.name}.yaml` names each source).",
        "",
        "Assumed: one document, contiguous shards, bf16, KL loss on, fetched pairs kept for the backward "
        "pass, index scoring shared between mirror ranks. f, the share of remote (block, group) pairs "
        "that a rank selects, is **stated**, the mean over ranks; 0.5 is every block before the rank's "
        f"own: the others lie in the future. Selections: {answers[0].selections.partition(', ')[2]}.",
        "",
        *(f"- `{name}`: {source}" for name, source in data["clusters"].items()),
        "",
        "Left out:",
        *(f"- {text};" for text in LEFT_OUT),
        "",
        "recv: bytes received per layer, forward and backward, mean over ranks; far: the most that a rank "
        "receives from other nodes; exposed: time of the wire that computing does not hide; layer: "
        "forward and backward; memory: largest buffers of the exchange, index keys included. "
        "`all_gather_early` starts its gather before index scoring, as training does where it knows "
        "beforehand. Both gathers add gradients in fp32, as in training; the all-reduce, the nearest "
        f"rival's, adds in 16 bits. Sliced: queries select in {QUERY_SLICES} slices, and what a slice "
        "selected travels while the next one is scored.",
        "",
    ]
    for number, one in enumerate(answers):
        lines += _answer_lines(one, sliced_answers[2 * number : 2 * number + 2])
    lines += ["## Full-attention layers", "", "They do not depend on f.", ""]
    for name in CLUSTERS:
        lines += [
            f"`{name}`, ms per layer:",
            "",
            *_full_table([a for a in answers if a.scenario.cluster.name == name]),
            "",
        ]
    lines += [
        "## Speed kept from 8 ranks on",
        "",
        "Speed: work per rank and second, that is computing's share of the layer's time (kernel rates "
        f"being fixed), relative to 8 ranks of the same scheme. {ALIKE_TOKENS} neighbouring queries choose "
        f"alike, so f follows from the length: {WEAK_TOKENS} tokens per rank (weak), "
        f"{tokens_text(STRONG_TOKENS)} tokens in all (strong).",
        "",
    ]
    for name, both in curves.items():
        for way, points in both.items():
            lines += [f"### `{name}`, {way} scaling", "", *scaling_table(points), ""]
    return "\n".join(lines).rstrip() + "\n"


def _answer_lines(one: Answer, sliced: list[Answer]) -> list[str]:
    scenario = one.scenario
    # speed-ups are told against the best all-gather, without Ulysses groups, for all rows
    base = one.msa[Scheme.all_gather_early.value].total.total
    head = (
        *("scheme", "recv MB", "max recv", "max sent", "max far", "exposed ms", "imbalance ms", "layer ms"),
        *("x all_gather_early", "memory MB"),
    )
    rows = [_row(name, report, base) for name, report in one.msa.items()]
    for inner in sliced:
        head_size = inner.scenario.options.head_size
        heads = f", heads {head_size}" if head_size > 1 else ""
        rows += [_row(name, report, base, f", sliced{heads}") for name, report in inner.msa.items()]
    return [
        f"## {tokens_text(scenario.seq_len)} tokens, CP {scenario.cp_size}, f = {one.f:.2f}, "
        f"`{scenario.cluster.name}`",
        "",
        *table([head, *rows]),
        "",
    ]


def _row(name: str, report: SchemeReport, base: float, kind: str = "") -> tuple[str, ...]:
    total = report.total
    label = (f"{name} = {report.chosen.value}" if report.chosen else name) + kind
    sizes = (report.received.mean(), report.received.max(), report.sent.max(), report.far.max())
    return (
        label,
        *(f"{x / 1e6:,.0f}" for x in sizes),
        *(f"{max(x, 0) * 1e3:,.2f}" for x in (total.exposed, total.imbalance, total.total)),
        f"{base / total.total:.2f}",
        f"{report.memory_bytes / 1e6:,.0f}",
    )


def _full_table(answers: list[Answer]) -> list[str]:
    rows = [("tokens, CP", *(scheme.value for scheme in FullScheme))]
    for one in answers:
        label = f"{tokens_text(one.scenario.seq_len)}, {one.scenario.cp_size}"
        if one.full:
            rows.append((label, *(f"{one.full[s.value].total.total * 1e3:,.0f}" for s in FullScheme)))
    return table(rows)


def _commit() -> str:
    root = Path(__file__).resolve().parents[3]
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"
