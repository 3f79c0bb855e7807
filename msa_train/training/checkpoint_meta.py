"""Describe a checkpoint in its meta.json: which run, which step, which stages and packs led to it."""

from dataclasses import asdict
from typing import Any

from msa_train.checkpoint.compatibility import fingerprint, schedule_record
from msa_train.checkpoint.data_record import DataRecord
from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.parallel.process_groups import Groups
from msa_train.training.stability.skip_policy import SkipPolicy


def checkpoint_meta(
    config: RunConfig, groups: Groups, step: int, *, data: DataRecord, bad_steps: SkipPolicy, engine: str
) -> dict[str, Any]:
    """Return what meta.json says of the checkpoint after `step` steps; plain JSON.

    Args:
        config: of the processes that save, see `staging.views`.
        groups: their sizes.
        step: updates made.
        data: documents that the run is trained on.
        bad_steps: what was left out and passed over.
        engine: name of the engine.
    """
    stages = plan_stages(config)
    stage = stage_at(stages, step - 1)
    return {
        "consumed_samples": stage.samples_at(step),
        "fingerprint": fingerprint(config),
        "data": asdict(data),
        "stages": [stage.record() for stage in stages if stage.first_step < step],
        "ends_stage": step == stage.last_step and stage is not stages[-1],
        "tokens": stage.tokens_at(step),
        "schedule": schedule_record(config, step),
        "optimizer_updates": step - bad_steps.skipped,
        "bad_steps": bad_steps.record(),
        "engine": engine,
        "optimizer": config.optim.algorithm.value,
        "precision": config.train.precision.value,
        "layout": {
            "world_size": groups.world_size,
            "cp_size": groups.cp_size,
            "ep_size": groups.ep_size,
            "tp_size": groups.tp_size,
            "pp_size": groups.pp_size,
            "dp_size": groups.dp_size,
        },
    }
