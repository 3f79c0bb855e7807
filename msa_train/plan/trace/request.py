"""Ask for a trace in a process of its own, and answer there."""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from msa_train.config import RunConfig
from msa_train.plan.trace.assumptions import Assumptions, Place
from msa_train.plan.trace.config_json import config_from_json, config_to_json


class TraceError(RuntimeError):
    """Report that a trace came to no end; the text ends with what it said."""


def trace_in_child(
    config: RunConfig,
    *,
    world_size: int,
    place: Place | None = None,
    assumptions: Assumptions | None = None,
    with_save: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Trace one rank in a new process; see `step.trace_rank`.

    Takes 10 to 60 s of one CPU core and about 1 GiB of memory for a stage of M3 at 1M tokens.

    Returns:
        `TraceReport.to_json`.

    Raises:
        TraceError: the trace failed.
    """
    request = {
        "config": config_to_json(config),
        "world_size": world_size,
        "place": asdict(place or Place()),
        "assumptions": asdict(assumptions or Assumptions()),
        "with_save": with_save,
        "quick": quick,
    }
    done = subprocess.run(
        [sys.executable, "-m", "msa_train.plan.trace"],
        input=json.dumps(request), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise TraceError(
            f"the trace of stage {request['place']['pp_rank']} failed: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for, in this process; missing parts of it have their defaults."""
    # torch and Megatron are loaded where the trace runs only
    from msa_train.plan.trace.step import trace_rank

    assumptions = dict(request.get("assumptions", {}))
    assumptions["documents"] = tuple(assumptions.get("documents", ()))
    report = trace_rank(
        config_from_json(request["config"]),
        world_size=request["world_size"],
        place=Place(**request.get("place", {})),
        assumptions=Assumptions(**assumptions),
        with_save=request.get("with_save", True),
        quick=request.get("quick", False),
    )
    return report.to_json()
