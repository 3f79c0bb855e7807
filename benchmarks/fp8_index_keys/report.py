"""Write the comparison as Markdown."""

from typing import Any

_FIGURES = {
    "blocks": "selected blocks in common",
    "student": "probability of the index branch",
    "attention": "attention of the main branch",
}


def markdown(result: dict[str, Any]) -> str:
    """Write one table: formats of index keys, and what their selections share with that in fp32."""
    where = result["machine"]
    lines = [
        "# Selection with 8-bit index keys",
        "",
        f"`{result['command']}`, {result['seconds'] / 60:.1f} minutes, commit {where['commit']}, "
        f"{where['cpu']}, Linux {where['kernel']}, Python {where['python']}.",
        "",
        "Index keys rounded to bf16, and to float8_e4m3fn with a power of two per token as a decoding cache "
        "keeps them; index queries stay in fp32, but in `fp8 both` are rounded likewise, as "
        "`select_blocks(fp8=True)` does. All is relative to the selection with fp32 keys, per query "
        "and KV group, of queries that see more blocks than they take. Blocks in common: the query's own, "
        "which is forced, does not count. Probability, attention: what the selected blocks hold, over what "
        "those of the fp32 selection hold.",
        "",
    ]
    for case in result["cases"]:
        lines += [
            f"- `{case['name']}`: {case['what']}; {case['tokens']} tokens, index dim {case['index_dim']}, "
            f"{case['topk']} blocks of {case['block_size']}, {case['queries']} queries."
        ]
    lines += ["", "| keys | figure | format | mean | lowest 1 % | worst |", "|---|---|---|---|---|---|"]
    for case in result["cases"]:
        for figure, name in _FIGURES.items():
            for kind, values in case["formats"].items():
                if figure in values:
                    row = [values[figure][part] for part in ("mean", "low_1_percent", "worst")]
                    cells = " | ".join(f"{value:.4f}" for value in row)
                    lines.append(f"| {case['name']} | {name} | {kind} | {cells} |")
    lines += ["", "Bytes of a cached index key: 2 per channel in bf16; 1 per channel and 4 in fp8."]
    return "\n".join(lines) + "\n"
