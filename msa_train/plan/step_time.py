"""Time a step: stages by their layers, the pipeline's bubble, reduction of gradients, optimizer.

1F1B: a micro-batch passes all stages once, and each further one waits for the slowest. With v chunks per rank
the waiting at both ends falls to 1 / v.
"""

from dataclasses import dataclass

from msa_train.config import Recompute, RunConfig
from msa_train.config.optimizer_bytes import optimizer_bytes
from msa_train.config.pipeline.layout import num_microbatches
from msa_train.config.recompute import recompute_modules, stage_recomputes
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.flop_count import flops_per_token
from msa_train.plan.layer_time import LayerTimes, PassSeconds
from msa_train.plan.memory import own_parameters
from msa_train.plan.stage_parameters import stage_parameters
from msa_train.plan.stages import Stages
from msa_train.simulate.costs import collective_cost

_PARTS_OF_MODULE: dict[str, set[str]] = {
    "attention": {"sparse attention", "dense attention", "exchange"},
    "experts": {"experts", "dispatch"},
    "ffn": {"feed-forward"},
    "norm": set(),
}
"parts of a layer's seconds that train.recompute_modules names"


@dataclass(slots=True)
class StepTime:
    """Hold the seconds of one step and what follows from them."""

    seconds: float
    "of a step"
    parts: dict[str, float]
    "by part, of the slowest stage, all micro-batches; with bubble, gradients and optimizer they add up"
    stage_seconds: list[float]
    "of a micro-batch, forward and backward, by stage"
    tokens_per_s: float
    "of one GPU"
    mfu_sparse: float
    "FLOPs that are computed, without recomputation, as a share of the peak"
    mfu_dense: float
    "the same with every MSA layer counted as full attention"

    @property
    def imbalance(self) -> float:
        """Return the slowest stage over the mean of all."""
        return max(self.stage_seconds) * len(self.stage_seconds) / sum(self.stage_seconds)


def step_time(
    config: RunConfig, world_size: int, stages: Stages, times: LayerTimes, assumed: Assumptions
) -> StepTime:
    """Time one step of a run.

    Args:
        config: the run.
        world_size: ranks of the job.
        stages: layers of every pipeline stage.
        times: of its layers.
        assumed: what arithmetic cannot know.
    """
    parallel, train = config.parallel, config.train
    num_micro = max(1, num_microbatches(config, world_size))
    by_stage = [_stage_parts(config, stages, times, stage) for stage in range(parallel.pp_size)]
    stage_s = [sum(parts.values()) for parts in by_stage]
    slowest = max(range(parallel.pp_size), key=lambda stage: stage_s[stage])
    parts = {name: seconds * num_micro for name, seconds in by_stage[slowest].items()}
    parts["bubble"] = (sum(stage_s) - stage_s[slowest]) / stages.num_chunks
    reduced = [_reduce_seconds(config, world_size, stages, times, stage) for stage in range(parallel.pp_size)]
    parts["gradients and weights"] = max(reduced)
    updated = [_update_seconds(config, world_size, stages, assumed, s) for s in range(parallel.pp_size)]
    parts["optimizer"] = max(updated)
    seconds = sum(parts.values())
    tokens = config.data.seq_len * train.global_batch_size
    rate = tokens / seconds / world_size
    sparse, dense = (
        flops_per_token(config, assumed.num_docs, dense=dense) * rate / assumed.peak_flops
        for dense in (False, True)
    )
    return StepTime(seconds, parts, stage_s, rate, sparse, dense)


def _stage_parts(config: RunConfig, stages: Stages, times: LayerTimes, stage: int) -> dict[str, float]:
    """Add up the seconds of a stage's micro-batch by part, recomputation a part of its own."""
    parts: dict[str, float] = {}
    kinds: dict[tuple[object, bool], tuple[PassSeconds, int]] = {}
    # layers of a kind cost the same: each kind is timed once
    for layer in stages.layers[stage]:
        key = (config.model.attention_kinds()[layer], layer < config.model.num_dense_ffn_layers)
        seconds, count = kinds.get(key, (None, 0))
        kinds[key] = (seconds or times.layer(layer), count + 1)
    for seconds, count in kinds.values():
        for name, value in seconds.forward.items():
            parts[name] = parts.get(name, 0.0) + count * value
        for name, value in seconds.backward.items():
            parts[name] = parts.get(name, 0.0) + count * value
        again = count * _recomputed(config, seconds, stage_recomputes(config)[stage])
        if again:
            parts["recompute"] = parts.get("recompute", 0.0) + again
    if stage == config.parallel.pp_size - 1:
        head = times.head()
        parts["head"] = sum(head.forward.values()) + sum(head.backward.values())
    if config.parallel.pp_size > 1:
        # an activation and a gradient per boundary of a chunk, which nothing hides without interleaving
        shard = times.tokens * config.model.hidden_size * 2 / config.parallel.tp_size
        parts["pipeline transfer"] = 2 * shard / times.machine.cluster.network_rate
    return parts


def _recomputed(config: RunConfig, seconds: PassSeconds, kind: Recompute) -> float:
    """Return the forward seconds that run again: selection and routing are replayed, so no scoring.

    Experts in tiles are computed again in any case, but for their last product, and rows travel there once.
    """
    forward = {name: value for name, value in seconds.forward.items() if name != "scoring"}
    if config.train.tile_tokens:
        # of three products of equal size two are made again
        again = {"experts": 2 / 3, "feed-forward": 2 / 3, "dispatch": 1 / 2}
        forward |= {part: share * forward[part] for part, share in again.items() if part in forward}
    if kind is Recompute.full:
        return sum(forward.values())
    parts: set[str] = {"experts", "feed-forward", "dispatch"} if config.train.tile_tokens else set()
    for module in recompute_modules(config) if kind is Recompute.selective else ():
        parts |= _PARTS_OF_MODULE[module]
    return sum(forward.get(part, 0.0) for part in parts)


def _reduce_seconds(
    config: RunConfig, world_size: int, stages: Stages, times: LayerTimes, stage: int
) -> float:
    """Time scattering gradients and gathering weights of a stage over the ranks that hold the same."""
    parallel, cluster = config.parallel, times.machine.cluster
    counts = stage_parameters(config.model, config.attention, parallel, stages.layers, stage)
    stage_ranks = world_size // parallel.pp_size
    seconds = 0.0
    width = optimizer_bytes(config.optim, config.train.precision)
    for count, size in (
        (counts.dense, stage_ranks // parallel.tp_size),
        (counts.experts, stage_ranks // parallel.ep_size),
    ):
        if size == 1 or count == 0:
            continue
        spread = _whole_nodes(size, cluster.gpus_per_node)
        shard = count * width.unsharded / size
        seconds += collective_cost.all_gather(shard, spread, cluster).time_s(cluster) * size / spread
    return seconds


def _whole_nodes(size: int, per_node: int) -> int:
    """Return a number of ranks that fills whole nodes, as the simulation wants it: 12, 8 per node -> 8."""
    return size if size <= per_node else size // per_node * per_node


def _update_seconds(
    config: RunConfig, world_size: int, stages: Stages, assumed: Assumptions, stage: int
) -> float:
    """Time the optimizer by the bytes it reads and writes, on the device or over the host's link."""
    parallel, optim = config.parallel, config.optim
    counts = stage_parameters(config.model, config.attention, parallel, stages.layers, stage)
    shard = own_parameters(config, world_size, counts)
    # gradient in, master weight and two moments in and out, weight out: 4 + 12 + 12 + 2 bytes
    device = 30.0 * shard
    # zeroing the gradients and their norm pass over all of them
    device += 8.0 * (counts.dense + counts.experts)
    # both directions at once
    host = shard * optimizer_bytes(optim, config.train.precision).host_state / assumed.host_bytes_s
    return max(device / assumed.memory_bytes_s, host)
