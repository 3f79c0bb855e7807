"""Write the measurement as Markdown."""

from typing import Any

_GOALS = {32768: 1.0, 131072: 3.0}


def markdown(result: dict[str, Any]) -> str:
    """Write tables of times and peaks, and what was to be reached."""
    shape, where = result["shape"], result["machine"]
    lines = [
        "# MSA on the CPU",
        "",
        f"`{result['command']}`, {result['seconds'] / 60:.1f} minutes, commit {where['commit']}, "
        f"{result['threads']} threads on {where['cores']} cores of {where['cpu']}, Linux {where['kernel']}, "
        f"Python {where['python']}.",
        "",
        "The core of one MSA layer (selection, block-sparse attention, KL loss of the index branch) against "
        "torch's causal attention (`scaled_dot_product_attention`), forward and backward, fp32, one "
        f"document: {shape['num_heads']} query heads on {shape['num_kv_heads']} KV head, head and index dim "
        f"{shape['head_dim']}, blocks of {shape['block_size']}, top-{shape['topk']}. Inputs are normal "
        "random numbers: the selected blocks lie anywhere. Where every block is selected, the worst row of "
        f"output and gradients differs from torch's by {result['worst_row']:.1e} of the largest row.",
        "",
    ]
    if result["times"]:
        lines += [*_time_table(result), ""]
    if result["memory"]:
        lines += [*_memory_table(result), ""]
    return "\n".join([*lines, *_goals(result)]) + "\n"


def _time_table(result: dict[str, Any]) -> list[str]:
    heads = result["shape"]["num_heads"]
    lines = [
        "## Time",
        "",
        "Seconds, median of the rounds (each in a process of its own, the two in turns). Dense attention "
        "costs the same for every head, and in its backward each head has one core: long sequences are "
        f"measured with one head per core, and the time is multiplied up to {heads} heads. `others`: share "
        "of the cores' time that something else took during a run.",
        "",
        "| tokens | rounds | MSA | dense | MSA is faster by | peak MSA | peak dense | others at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["times"]:
        for count in row["dense_heads"]:
            dense = f"{row[f'dense_{count}_scaled_s']:.1f}"
            if count != heads:
                dense += f" ({count} heads: {row[f'dense_{count}_s']:.1f})"
            ratio = row[f"dense_{count}_scaled_s"] / row["msa_s"]
            names = ("msa", f"dense_{count}")
            peaks = [_gib(max(run["peak_bytes"] for run in row["runs"][name])) for name in names]
            others = max(run["others_share"] for name in names for run in row["runs"][name])
            cells = [row["seq_len"], len(row["runs"]["msa"]), f"{row['msa_s']:.1f}", dense, f"{ratio:.2f}x"]
            lines.append("| " + " | ".join(map(str, [*cells, *peaks, f"{others:.1%}"])) + " |")
    return lines


def _memory_table(result: dict[str, Any]) -> list[str]:
    shape = result["memory_shape"]
    lines = [
        "## Memory",
        "",
        f"Peak resident memory of forward and backward with {shape['num_heads']} heads of "
        f"{shape['head_dim']}, each length in a process of its own. `tensors`: queries, output and their "
        "gradients, which the caller has anyway; `per token`: peak above the bare process.",
        "",
        "| tokens | peak | tensors | per token |",
        "|---|---|---|---|",
    ]
    for row in result["memory"]:
        tensors = 4 * row["seq_len"] * shape["num_heads"] * shape["head_dim"] * 4
        cells = [
            row["seq_len"],
            _gib(row["peak_bytes"]),
            _gib(tensors),
            f"{per_token(row) / 1024:.1f} KiB",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def per_token(row: dict[str, Any]) -> float:
    """Divide by the tokens the peak bytes above those of the process before it had inputs."""
    return (row["peak_bytes"] - row["process_bytes"]) / row["seq_len"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _goals(result: dict[str, Any]) -> list[str]:
    lines = ["## Goals", ""]
    for row in result["times"]:
        goal = _GOALS.get(row["seq_len"])
        if goal is not None:
            lines.append(
                f"- {row['seq_len']} tokens: {row['ratio']:.2f} times as fast as dense; {goal:g} is wanted."
            )
    if len(result["memory"]) > 1:
        first, last = result["memory"][0], result["memory"][-1]
        tokens = last["seq_len"] / first["seq_len"]
        lines.append(
            f"- Peak memory from {first['seq_len']} to {last['seq_len']} tokens, {tokens:g} times as many: "
            f"{tokens * per_token(last) / per_token(first):.1f} times as much; linear is wanted."
        )
    return lines
