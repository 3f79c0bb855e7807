"""Write the measurement as Markdown."""

from typing import Any

from benchmarks.exchange.schemes import REFERENCE

Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """Write tables of all rows."""
    shape, where = result["shape"], result["machine"]
    kl = "with" if shape["with_kl"] else "without"
    lines = [
        "# The exchange on the wire",
        "",
        f"`{result['command']}`, {result['seconds'] / 60:.1f} minutes, commit {where['commit']}, "
        f"{where['cores']} cores of {where['cpu']}, Linux {where['kernel']}, Python {where['python']}.",
        "",
        f"Forward and backward of one MSA layer's exchange and attention: {shape['seq_len']} tokens, blocks "
        f"of {shape['block_size']}, top-{shape['topk']}, {shape['num_kv_heads']} KV groups of "
        f"{shape['heads_per_group']} query head(s), head and index dim {shape['head_dim']}, fp32, {kl} KL "
        f"loss. {result['rounds']} rounds (without a limit one less) with the schemes in turns; a step lasts "
        "until its last rank is done.",
        "",
    ]
    for group in _grouped(result["rows"]):
        lines += [*_time_table(group), ""]
    lines += [*_byte_table(result["rows"], shaped=result["shaped"]), ""]
    lines += _node_table([row for row in result["rows"] if row["node_rate_mbit"]])
    if result["memory"]:
        lines += [*_memory_table(result["memory"]), ""]
    lines += goals(result)
    return "\n".join(lines) + "\n"


def goals(result: dict[str, Any]) -> list[str]:
    """Write what was to be reached, and what the figures say."""
    rows: list[Row] = result["rows"]
    lines = ["## Goals", ""]
    if result["shaped"]:
        worst = max(rows, key=lambda row: abs(byte_ratio(row) - 1))
        text = _where(worst)
        lines.append(
            f"- Bytes of the interfaces against the formula: within 5 % everywhere is wanted; the farthest "
            f"is {byte_ratio(worst):.3f} ({worst['scheme']}, f {worst['f']:.3f}, {text})."
        )
    few = [row for row in rows if row["scheme"] == "selected" and 0 < row["f"] <= 0.205]
    if few:
        share = max(
            total(row, "formula_bytes") / total(reference_of(row, rows), "formula_bytes") for row in few
        )
        lines.append(
            f"- `selected` at f <= 0.2: at most {share:.3f} of the all-gather's bytes; 0.25 is wanted."
        )
    slow = [row for row in few if row["rate_mbit"] == _slowest(rows) and not row["node_rate_mbit"]]
    if slow and _slowest(rows):
        gain = min(reference_of(row, rows)["step_s_median"] / row["step_s_median"] for row in slow)
        lines.append(
            f"- `selected` at f <= 0.2 and {_slowest(rows)} Mbit/s: at least {gain:.1f} times as fast as "
            "all-gather; 2 is wanted."
        )
    limited = [row for row in rows if row["rate_mbit"]] or rows
    full = [row for row in limited if row["scheme"] == "auto" and row["f"] > 0.999]
    if full:
        cost = max(row["step_s_median"] / reference_of(row, rows)["step_s_median"] for row in full)
        lines.append(f"- `auto` at f = 1: at most {cost:.2f} of the all-gather's time; 1.05 is wanted.")
    return lines


def byte_ratio(row: Row) -> float:
    """Divide the received bytes of all interfaces by those of the formula; headers add a little to 1."""
    return total(row, "interface_received_bytes") / total(row, "formula_bytes")


def total(row: Row, key: str) -> float:
    """Sum a figure over ranks."""
    return sum(row[key])


def reference_of(row: Row, rows: list[Row]) -> Row:
    """Find the all-gather measured in turns with this row."""
    keys = ("part", "rate_mbit", "node_rate_mbit", "selection")
    return next(r for r in rows if r["scheme"] == REFERENCE and all(r[k] == row[k] for k in keys))


def _slowest(rows: list[Row]) -> int:
    return min((row["rate_mbit"] for row in rows if row["rate_mbit"]), default=0)


def _grouped(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["rate_mbit"], row["node_rate_mbit"]), []).append(row)
    return list(groups.values())


def _where(row: Row) -> str:
    ranks = {"2x4": "2 nodes of 4 ranks"}.get(row["part"], f"{row['part']} ranks")
    rate = f"{row['rate_mbit']} Mbit/s each" if row["rate_mbit"] else "no limit"
    between = f", {row['node_rate_mbit']} Mbit/s between the nodes" if row["node_rate_mbit"] else ""
    return f"{ranks}, {rate}{between}"


def _time_table(rows: list[Row]) -> list[str]:
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    lines = [
        f"## {_where(rows[0])}",
        "",
        "Seconds per step, median (min), and how many times as fast as all-gather.",
        "",
    ]
    lines += ["| f | " + " | ".join(schemes) + " |", "|---|" + "---|" * len(schemes)]
    for selection in dict.fromkeys(row["selection"] for row in rows):
        here = {row["scheme"]: row for row in rows if row["selection"] == selection}
        base = here[REFERENCE]["step_s_median"]
        figures = [(here[s]["step_s_median"], here[s]["step_s_min"]) for s in schemes]
        cells = [f"{median:.3f} ({least:.3f}) {base / median:.2f}x" for median, least in figures]
        lines.append(f"| {_f(here[REFERENCE])} | " + " | ".join(cells) + " |")
    return lines


def _f(row: Row) -> str:
    if row["selection"] != "trained":
        return f"{row['f']:.3f}"
    return f"{row['f']:.3f} (trained, {min(row['f_by_rank']):.2f} to {max(row['f_by_rank']):.2f} by rank)"


def _byte_table(rows: list[Row], *, shaped: bool) -> list[str]:
    """Write the bytes, which do not depend on the rate; the ratio is the farthest from 1 of all rates."""
    lines = [
        "## Bytes",
        "",
        "Received per rank and step, mean over ranks, by the closed formula; in brackets:",
    ]
    if shaped:
        lines += ["what the interfaces counted over the formula, the farthest from 1 of all rates.", ""]
    else:
        lines += ["what the collectives counted over the formula.", ""]
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    lines += ["| ranks | f | " + " | ".join(schemes) + " |", "|---|---|" + "---|" * len(schemes)]
    for part, selection in dict.fromkeys((row["part"], row["selection"]) for row in rows):
        cells: list[str] = []
        for scheme in schemes:
            same = [r for r in rows if (r["part"], r["selection"], r["scheme"]) == (part, selection, scheme)]
            if not same:
                cells.append("")
                continue
            ratios = [byte_ratio(r) if shaped else _counted_ratio(r) for r in same]
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            # `auto` may choose differently at each rate; shown is the last one.
            mean = total(same[-1], "formula_bytes") / len(same[-1]["formula_bytes"])
            cells.append(f"{mean / 1e6:.2f} MB ({worst:.3f})")
        first = next(r for r in rows if (r["part"], r["selection"]) == (part, selection))
        lines.append(f"| {part} | {first['f']:.3f} | " + " | ".join(cells) + " |")
    return lines


def _node_table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    lines = ["Between the two nodes, both ways together, as the interfaces counted, MB per step:", ""]
    lines += ["| f | " + " | ".join(schemes) + " |", "|---|" + "---|" * len(schemes)]
    for selection in dict.fromkeys(row["selection"] for row in rows):
        here = [row for row in rows if row["selection"] == selection]
        found = {row["scheme"]: row["between_nodes_bytes"] for row in here}
        cells = [f"{found[scheme] / 1e6:.2f}" for scheme in schemes]
        lines.append(f"| {here[0]['f']:.3f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _counted_ratio(row: Row) -> float:
    return total(row, "counted_bytes") / total(row, "formula_bytes")


def _memory_table(rows: list[Row]) -> list[str]:
    base = max(next(row for row in rows if row["scheme"] == REFERENCE)["peak_bytes"])
    lines = [
        "## Memory",
        "",
        f"Peak resident bytes of one step above its inputs, largest rank, f {rows[0]['selection']}, "
        f"{rows[0]['seq_len']} tokens, {len(rows[0]['peak_bytes'])} ranks.",
        "",
        "| scheme | peak | of all-gather |",
        "|---|---|---|",
    ]
    for row in rows:
        peak = max(row["peak_bytes"])
        lines.append(f"| {row['scheme']} | {peak / 2**20:.0f} MiB | {peak / base:.2f} |")
    return lines
