"""Write the table of the large presets before and after, from two files of `trace_presets` and from formulas.

python -m benchmarks.plan.summary --out benchmarks/results/plan
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import commit
from benchmarks.plan.trace_presets import GIB, PRESETS
from launchers.hydra_config.compose import compose_run
from msa_train.config import RunConfig
from msa_train.config.pipeline import resolve_layout
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.layer_time import Machine
from msa_train.plan.search import Plan, plan_of, timed
from msa_train.simulate.inputs.cluster import load_cluster
from msa_train.simulate.inputs.rates import load_rates

# what the presets were at commit b23db9a, in today's keys
BEFORE = (
    *("parallel.pp_layout=even", "parallel.cp_head_size=1", "parallel.kv_exchange=selected"),
    *("exchange.ranks_per_node=0", "exchange.query_slices=1", "train.tile_tokens=0"),
    *("train.offload_activations=false", "optim.offload=0"),
)


def planned(config: RunConfig, world_size: int) -> Plan:
    """Count and time a run by formulas."""
    assumed = Assumptions()
    plan = plan_of(config, world_size, resolve_layout(config, world_size), assumed)
    return timed(plan, Machine(load_cluster("h100"), load_rates("h100_assumed")), assumed)


def traced(reports: dict[str, Any], preset: str, stage: int) -> str:
    """Write step, save and host of a stage, GiB."""
    report = reports[f"{preset} stage {stage}"]
    sizes = (report["step"], report["save"], report["save_host"])
    return " / ".join(f"{size['num_bytes'] / GIB:.1f}" for size in sizes)


def lines(folder: Path) -> list[str]:
    """Make the tables."""
    before, now = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "now"))
    found = ["# M3 on GPUs of 80 GB: traced memory, modelled time", ""]
    found += [
        "Memory: the trainer's own step and save of the fullest rank, traced without a GPU; GiB of step /",
        "save / host at the save, without margins (a GPU shows 79.6 GiB; 5.8 are set aside). Before is",
        "b23db9a. Time: `msa-plan`, rates `h100_assumed`, which nobody has measured; before and now by the",
        f"code of commit {commit()}. One document per pack, f 0.2, imbalance 1.3.",
        "",
        "| preset | stage | before | now | formula, now |",
        "|---|---|---|---|---|",
    ]
    plans: dict[str, tuple[Plan, Plan]] = {}
    for preset, world_size in PRESETS.items():
        old, new = (
            planned(compose_run([f"run={preset}", *overrides]), world_size) for overrides in (BEFORE, ())
        )
        plans[preset] = old, new
        for stage, memory in enumerate(new.memory):
            formula = memory.peak / now[f"{preset} stage {stage}"]["step"]["num_bytes"] - 1
            found.append(
                f"| {preset} | {stage} | {traced(before, preset, stage)} | {traced(now, preset, stage)} | "
                f"{formula:+.1%} |"
            )
    found += ["", "| preset | layers | s per step | tokens/s/GPU | MFU | slowest / mean |", "|---" * 6 + "|"]
    for preset, both in plans.items():
        for name, plan in zip(("before", "now"), both, strict=True):
            time = plan.time
            assert time is not None, "timed above"
            found.append(
                f"| {preset}, {name} | {plan.layout} | {time.seconds:.1f} | {time.tokens_per_s:.0f} | "
                f"{time.mfu_sparse:.1%} | {time.imbalance:.2f} |"
            )
    found += ["", "What the step of each preset waits for now, share of its time:", ""]
    for preset, (_, new) in plans.items():
        assert new.time is not None, "timed above"
        shares = sorted(new.time.parts.items(), key=lambda part: -part[1])[:8]
        text = ", ".join(f"{name} {seconds / new.time.seconds:.0%}" for name, seconds in shares)
        found.append(f"- {preset}: {text}")
    return found


def main() -> None:
    """Write plan.md into the folder of the traces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    (folder / "plan.md").write_text("\n".join(lines(folder)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
