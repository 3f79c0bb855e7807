"""Trace every stage of the large presets and write what they hold: JSON, and a table on stdout."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers.hydra_config.compose import compose_run
from msa_train.plan.trace.assumptions import Place
from msa_train.plan.trace.request import trace_in_child

PRESETS = {"m3_1m": 256, "m3_200k": 128}
GIB = 2**30


def traces(
    preset: str, world_size: int, overrides: Sequence[str] = (), *, quick: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the report of each pipeline stage."""
    config = compose_run([f"run={preset}", *overrides])
    for stage in range(config.parallel.pp_size):
        yield stage, trace_in_child(config, world_size=world_size, place=Place(pp_rank=stage), quick=quick)


def row(name: str, report: dict[str, Any], seconds: float) -> str:
    """Make a row of the table, GiB."""
    save, host = report["save"], report["save_host"]
    figures = [report["static_bytes"], report["step"]["num_bytes"], save["num_bytes"], host["num_bytes"]]
    parts = ", ".join(
        f"{part} {size / GIB:.1f}" for part, size in report["step"]["by_part"].items() if size > GIB / 4
    )
    return (
        f"| {name} | "
        + " | ".join(f"{figure / GIB:.1f}" for figure in figures)
        + f" | {parts} | {seconds:.0f} |"
    )


def main() -> None:
    """Trace, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--quick", action="store_true", help="up to the first backward pass, and the update")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    print("| stage | at rest | step | save | save, host | parts of the step's peak | s |")
    print("|---" * 7 + "|")
    for preset in arguments.presets:
        begin = time.perf_counter()
        for stage, report in traces(preset, PRESETS[preset], arguments.overrides, quick=arguments.quick):
            found[f"{preset} stage {stage}"] = report
            print(row(f"{preset} {stage}", report, time.perf_counter() - begin), flush=True)
            begin = time.perf_counter()
            arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
