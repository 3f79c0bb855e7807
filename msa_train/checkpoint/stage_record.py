"""Stages that a checkpoint was trained in, against those of the run that goes on from it."""

from typing import Any

from msa_train.config import RunConfig, plan_stages


def check_recorded_stages(meta: dict[str, Any], config: RunConfig) -> None:
    """Refuse to go on if a stage that was trained, in part or whole, is now another one.

    The length of the stage in which the checkpoint lies may change, and so may all later stages.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    step, plan = meta["step"], plan_stages(config)
    for index, recorded in enumerate(meta.get("stages", [])):
        is_over = recorded["first_step"] + recorded["num_steps"] <= step and index + 1 < len(plan)
        planned = plan[index].record() if index < len(plan) else {}
        for key, value in recorded.items():
            if planned.get(key) == value or (key == "num_steps" and not is_over):
                continue
            raise ValueError(
                f"stages: the checkpoint of step {step} in run_dir={config.run_dir} was trained with "
                f"{key}={value} in stage {index + 1} ({recorded['name']}), now it is "
                f"{planned.get(key, 'absent')}; change only stages from that step on, or use another run_dir "
                "with checkpoint.load"
            )
