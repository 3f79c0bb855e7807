"""Write the table of benchmarks/optim_memory."""

from pathlib import Path
from typing import Any


def write_report(found: dict[str, Any], path: Path) -> None:
    """Write losses and bytes of each setting, and the times of the update.

    Args:
        found: what `run.py` has measured.
        path: of the Markdown file.
    """
    default = found["runs"][0]
    lines = [
        "# Smaller gradients and optimizer states: what they change",
        "",
        f"`{found['command']}`, commit {found['commit']}, {found['cpu']}, one thread.",
        "",
        f"The demo's model in bf16, AdamW, {found['steps']} steps of {found['micro_batches']} micro-batches",
        f"of {found['seq_len']} bytes, engine=torch. Losses in nats per byte: training, mean of the last",
        "tenth of the steps, and 16 held-out packs. Apart: largest difference of a step's loss from the",
        "default's. Bytes per parameter are counted by `msa_train.config.optimizer_bytes`.",
        "",
        "| optim. | training | difference | held out | difference | apart | device | host |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in found["runs"]:
        apart = max(abs(a - b) for a, b in zip(run["losses"], default["losses"], strict=True))
        lines.append(
            f"| {run['name']} | {run['train']:.4f} | {run['train'] - default['train']:+.4f} "
            f"| {run['validation']:.4f} | {run['validation'] - default['validation']:+.4f} | {apart:.4f} "
            f"| {run['device_bytes']:.2f} | {run['host_bytes']:.2f} |"
        )
    ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in found["update_time_ratio"].items())
    lines += [
        "",
        f"Time of one update of {found['timed_parameters'] / 1e6:.1f}M fp32 parameters on one CPU thread, as",
        f"a multiple of torch.optim.AdamW(foreach=True) in the same round, median: {ratios}.",
        "",
    ]
    path.write_text("\n".join(lines))
