"""Evaluate a checkpoint as one rank of a job: what msa-eval starts in place of the training.

    join, groups, data, engine    as in `worker`
    load_newest                   the weights alone of checkpoint.load
    Evaluator.run                 all tasks and lengths
    log, table                    rank 0: evaluation.jsonl, TensorBoard, the terminal

The engine is the training's, with its optimizer: what can be trained can be evaluated, in any layout.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from msa_train.checkpoint.all_ranks import run_on_all_ranks
from msa_train.checkpoint.find import ResumePoint, select_checkpoint
from msa_train.checkpoint.load import load_newest, load_weights
from msa_train.checkpoint.manifest import MANIFEST_NAME
from msa_train.config import RunConfig, Stage, plan_stages, printable
from msa_train.config.staging.views import has_layouts, layout_config
from msa_train.evaluation.evaluator import Evaluator
from msa_train.evaluation.log import EvaluationLog
from msa_train.evaluation.table import table_lines
from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.evaluation_hook import run_facts
from msa_train.training.worker import build_engine, built_groups, check_agreement, load_data, run_as_rank

SOURCE = "msa-eval"


def run_evaluation(config: RunConfig) -> bool:
    """Evaluate as one rank of the job; config.run_dir is the folder `evaluation` in the results' folder.

    Returns:
        False: nothing goes on after it.

    Raises:
        Exception: whatever ends it, see `run_as_rank`.
    """
    return run_as_rank(config, _evaluate)


def _evaluate(config: RunConfig, device: torch.device, watch: FaultWatch | None) -> bool:
    """Build everything, load the weights, evaluate and report."""
    with loaded_checkpoint(config, device, watch) as (evaluator, step):
        rows = evaluator.run(step, source=SOURCE, within_stage=False)
        if evaluator.engine.groups.rank == 0:
            folder = Path(config.run_dir).parent
            notes = EvaluationLog(folder, tensorboard=config.logging.tensorboard).write(rows)
            for line in (*table_lines(rows), *notes):
                print(printable(line), flush=True)
    return False


@contextmanager
def loaded_checkpoint(
    config: RunConfig, device: torch.device, watch: FaultWatch | None
) -> Iterator[tuple[Evaluator, int]]:
    """Build groups, data and engine as a training does, and load the newest checkpoint's weights.

    All ranks call it, inside `run_as_rank`. The groups are gone afterwards.

    Args:
        config: of the evaluation.
        device: of this rank.
        watch: of its faults, if there is one.

    Yields:
        What evaluates it, and its step.

    Raises:
        ValueError: there is no checkpoint, or a file of the user's cannot be used.
    """
    with built_groups(config, device, watch, _own_layout) as (config, groups):
        data = load_data(config)
        check_agreement(data, groups.device)
        engine = build_engine(config, groups)
        # however it ends
        with closing(engine):
            found = _load(config, engine)
            stage = stage_of(config, found.meta)
            engine.set_stage(stage)
            facts = _facts(config, found) if groups.rank == 0 else {}
            evaluator = Evaluator(engine, data.validation.get, facts)
            if groups.rank == 0:
                lines = (*found.messages, f"evaluating {found.path}, step {found.step}, stage {stage.name}")
                for line in lines:
                    print(printable(line), flush=True)
            yield evaluator, found.step


def _own_layout(config: RunConfig) -> RunConfig:
    """Return the configuration of the stage that the checkpoint was trained in, with its layout."""
    if not has_layouts(config):
        return layout_config(config, plan_stages(config)[0].name)
    name = run_on_all_ranks(lambda: _stage_name(config) if dist.get_rank() == 0 else "", None)[0]
    return layout_config(config, name)


def _stage_name(config: RunConfig) -> str:
    found = select_checkpoint(config, full=False)
    return stage_of(config, {} if found is None else found.meta).name


def _load(config: RunConfig, engine: TrainEngine) -> ResumePoint:
    """Load the weights of the newest sound checkpoint. All ranks call it."""

    def load(found: ResumePoint) -> None:
        weights, _ = load_weights(found.path, engine.sharded_state(loading=True)["model"])
        engine.load_weights(weights)

    found = load_newest(config, load)
    if found is None:
        raise ValueError("checkpoint.load=: there is no checkpoint to evaluate; name a run that has saved")
    return found


def stage_of(config: RunConfig, meta: dict[str, Any]) -> Stage:
    """Find the stage that a checkpoint was last trained in, by its name; else the last one of the run."""
    stages = plan_stages(config)
    recorded = meta.get("stages") or [{}]
    name = recorded[-1].get("name") if isinstance(recorded[-1], dict) else None
    return next((stage for stage in stages if stage.name == name), stages[-1])


def _facts(config: RunConfig, found: ResumePoint) -> dict[str, Any]:
    manifest = (found.path / MANIFEST_NAME).read_bytes()
    weights = f"sha256:{hashlib.sha256(manifest).hexdigest()[:16]}"
    return run_facts(config, checkpoint=str(found.path), weights=weights)
