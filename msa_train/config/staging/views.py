"""Look at a run as one of its stages sees it: the layout of its processes, and its rules alone.

All processes of a run have one layout at a time: groups, shards and the engine are built for it. Stages in a
row with the same layout share processes. Where the layout changes, the processes end with a checkpoint, and
the next ones begin from it (`launchers/local/stage_starts.py`). The number of ranks is that of the job.
"""

from collections.abc import Callable
from dataclasses import fields, replace

from msa_train.config.options import Recompute, StageRecompute
from msa_train.config.run import RunConfig, TrainConfig
from msa_train.config.stage_plan import plan_stages, step_sizes
from msa_train.config.stages import StageConfig, StageParallelConfig
from msa_train.config.staging.stage import Stage

_SIZES = tuple(field.name for field in fields(StageParallelConfig))


def layout_config(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of the processes that train a stage: its `parallel` and `recompute` in place.

    Stages, and so steps and packs, stay what they are. Applied to a result again, for any stage, it gives
    what it would have given at first.

    Args:
        config: the whole run, or a result of this function.
        name: of a stage; any other, as `main` of a run without stages, has the run's own layout.

    Example: parallel.cp_size=4 and stages.long.parallel.cp_size=8 -> cp_size 8 for "long", 4 for all others.
    """
    stages = {key: _resolved(config, stage) for key, stage in config.stages.items()}
    whole = replace(config, stages=stages)
    if name not in stages:
        return whole
    stage = stages[name]
    sizes = {key: getattr(stage.parallel, key) for key in _SIZES}
    train = _recomputed(config.train, stage.recompute)
    return replace(whole, parallel=replace(config.parallel, **sizes), train=train)


def _resolved(config: RunConfig, stage: StageConfig) -> StageConfig:
    """Write out what a stage leaves to the run, so that it means the same in every layout."""
    given = {key: getattr(stage.parallel, key) or getattr(config.parallel, key) for key in _SIZES}
    recompute = stage.recompute
    if recompute is StageRecompute.run and not config.train.recompute_stages:
        recompute = StageRecompute(config.train.recompute.value)
    return replace(stage, parallel=StageParallelConfig(**given), recompute=recompute)


def _recomputed(train: TrainConfig, recompute: StageRecompute) -> TrainConfig:
    if recompute is StageRecompute.run or recompute.value == train.recompute.value:
        return train
    return replace(train, recompute=Recompute(recompute.value), recompute_stages="")


def same_processes(config: RunConfig, name: str, other: str) -> bool:
    """Tell whether two stages are trained by the same processes."""
    one, two = (layout_config(config, stage) for stage in (name, other))
    return (one.parallel, one.train) == (two.parallel, two.train)


def processes_of(config: RunConfig, stage: Stage) -> tuple[Stage, ...]:
    """Return the stages around one that share its processes, in order, itself among them."""
    plan = plan_stages(config)
    first = last = stage.index
    while first > 0 and same_processes(config, plan[first - 1].name, stage.name):
        first -= 1
    while last + 1 < len(plan) and same_processes(config, plan[last + 1].name, stage.name):
        last += 1
    return plan[first : last + 1]


def single_stage(config: RunConfig, name: str) -> RunConfig:
    """Return a run of one stage alone: its layout, usual packs, top-k and attention; for estimates."""
    (stage,) = (one for one in plan_stages(config) if one.name == name)
    given, own = config.stages[name], layout_config(config, name)
    kept = StageConfig(attention=given.attention, kl=given.kl)
    return replace(
        own,
        stages={name: kept},
        data=replace(config.data, seq_len=stage.seq_len),
        train=replace(own.train, global_batch_size=stage.global_batch_size, steps=stage.num_steps),
        attention=replace(config.attention, topk=stage.topk),
    )


def stages_of_layout(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages whose layout the configuration of these processes has; all where none has."""
    plan = plan_stages(config)
    own = [stage for stage in plan if layout_config(config, stage.name).parallel == config.parallel]
    return tuple(own) or plan


def has_layouts(config: RunConfig) -> bool:
    """Tell whether processes of several layouts train the run, one after another."""
    plan = plan_stages(config)
    return len(processes_of(config, plan[0])) < len(plan)


def layouts(config: RunConfig) -> list[tuple[tuple[Stage, ...], RunConfig]]:
    """List the layouts of a run in order, each with the stages that it trains and their configuration."""
    plan, found = plan_stages(config), list[tuple[tuple[Stage, ...], RunConfig]]()
    left = plan
    while left:
        own = processes_of(config, left[0])
        found.append((own, layout_config(config, own[0].name)))
        left = plan[own[-1].index + 1 :]
    return found


def check_views(config: RunConfig, check: Callable[[RunConfig], None]) -> None:
    """Check every stage's sizes as if it were the whole run; a message names the stage's own keys.

    Example: "parallel.cp_size=3: ..." -> "stages.long.parallel.cp_size=3: ..." where that stage has set it.

    Raises:
        ValueError: as `check`.
    """
    if not config.stages:
        check(config)
    # those behind train.steps too: the run may be made longer
    for name, given in config.stages.items():
        sizes, single = step_sizes(config, given), replace(layout_config(config, name), stages={})
        lengths = [(sizes.seq_len, sizes.global_batch_size, "")]
        if sizes.alternate.every:
            lengths.append((sizes.alternate.seq_len, sizes.alternate.global_batch_size, "alternate."))
        for seq_len, batch, of in lengths:
            train = replace(single.train, global_batch_size=batch, steps=max(config.train.steps, 1))
            try:
                attention = replace(config.attention, topk=given.topk or config.attention.topk)
                data = replace(config.data, seq_len=seq_len)
                check(replace(single, data=data, train=train, attention=attention))
            except ValueError as error:
                raise ValueError(_renamed(str(error), name, given, of)) from error


def _renamed(text: str, name: str, given: StageConfig, of: str) -> str:
    """Name the stage's keys in a message where the stage has set them."""
    place = f"stages.{name}."
    keys = {f"parallel.{key}": f"{place}parallel.{key}" for key in _SIZES if getattr(given.parallel, key)}
    if given.seq_len or of:
        keys["data.seq_len"] = f"{place}{of}seq_len"
    if given.global_batch_size or given.batch_tokens or of:
        keys["train.global_batch_size"] = f"{place}{of}global_batch_size"
    if given.topk:
        keys["attention.topk"] = f"{place}topk"
    if given.recompute is not StageRecompute.run:
        keys["train.recompute"] = f"{place}recompute"
    named = text
    for key, own in keys.items():
        named = named.replace(f"{key}=", f"{own}=")
    # a rule between keys of the run alone would not say which stage meets it
    return named if place in named or not keys else f"{named} (in stages.{name})"
