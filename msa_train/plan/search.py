"""Search layouts and memory switches for those that fit a number of GPUs, the fastest first.

Formulas alone decide what fits, a fraction of a millisecond each; only what fits is timed. The simulation of
attention layers, 1 to 3 s each, is shared by all layouts with the same sequence split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from msa_train.config import GradsDtype, KvExchange, MomentsDtype, Recompute, RunConfig, check_rules
from msa_train.config.pipeline import PipelineLayout, best_layout, layer_bytes, layer_prices
from msa_train.config.pipeline.layout import num_microbatches
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.layer_time import LayerTimes, Machine
from msa_train.plan.memory import RankMemory, rank_memory
from msa_train.plan.stages import stages_of
from msa_train.plan.step_time import StepTime, step_time
from msa_train.simulate.study import Answer

_POWERS = tuple(2**n for n in range(11))
_MAX_CHUNKS = 3


@dataclass(slots=True)
class Plan:
    """Hold one layout with its memory and time."""

    config: RunConfig
    "with all sizes and switches"
    world_size: int
    "ranks of the job"
    layout: PipelineLayout
    "layers of every pipeline rank"
    memory: list[RankMemory]
    "of every stage's fullest rank"
    time: StepTime | None = None
    "of a step; None: not asked for"

    @property
    def peak(self) -> float:
        """Return the bytes of the fullest stage."""
        return max(memory.peak for memory in self.memory)


def plan_of(config: RunConfig, world_size: int, layout: PipelineLayout, assumed: Assumptions) -> Plan:
    """Count the memory of one layout; nothing is timed."""
    stages = stages_of(layout)
    memory = [
        rank_memory(config, world_size, stages, stage, assumed) for stage in range(config.parallel.pp_size)
    ]
    return Plan(config, world_size, layout, memory)


def timed(
    plan: Plan, machine: Machine, assumed: Assumptions, known: dict[object, Answer] | None = None
) -> Plan:
    """Time the step of a plan, and return it; known: see LayerTimes."""
    times = LayerTimes(plan.config, machine, assumed, known)
    plan.time = step_time(plan.config, plan.world_size, stages_of(plan.layout), times, assumed)
    return plan


class Search:
    """Look through the layouts of a model on a number of GPUs."""

    def __init__(
        self,
        base: RunConfig,
        world_size: int,
        machine: Machine,
        assumed: Assumptions,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take what is asked.

        Args:
            base: model, length, batch and everything that is not searched.
            world_size: GPUs.
            machine: links and kernels.
            assumed: what arithmetic cannot know.
            say: gets a line of progress now and then.
        """
        self.base, self.world_size, self.machine, self.assumed, self.say = (
            base,
            world_size,
            machine,
            assumed,
            say,
        )
        self.smallest: Plan | None = None
        "the layout that needs least, whether it fits or not"
        self._answers: dict[object, Answer] = {}

    def best(self, count: int) -> list[Plan]:
        """Return the fastest layouts that fit, at most `count`, the first one the best."""
        fitting = [plan for sizes in self._sizes() for plan in self._fitting(sizes)]
        self.say(f"{len(fitting)} layouts fit; timing them")
        # a rough price orders them, so that the simulation is asked about few
        fitting.sort(key=self._rough_seconds)
        chosen = [timed(plan, self.machine, self.assumed, self._answers) for plan in fitting[: 12 * count]]
        chosen.sort(key=lambda plan: plan.time.seconds if plan.time else 0.0)
        return chosen[:count]

    def fits(self) -> bool:
        """Tell whether any layout fits."""
        return any(True for sizes in self._sizes() for _ in self._fitting(sizes))

    def _sizes(self) -> Iterator[RunConfig]:
        """Yield every way to divide the GPUs that the rules allow."""
        base, model = self.base, self.base.model
        per_node = self.machine.cluster.gpus_per_node
        tensor = [n for n in _POWERS if n <= per_node and model.num_kv_heads % n == 0]
        for tp_size, cp_size in product(tensor, _POWERS):
            for pp_size in range(1, min(model.num_layers, self.world_size) + 1):
                ranks = tp_size * cp_size * pp_size
                if self.world_size % ranks or base.train.global_batch_size % (self.world_size // ranks):
                    continue
                for ep_size in (n for n in _POWERS if model.num_experts % n == 0):
                    if (self.world_size // pp_size) % ep_size == 0:
                        yield from self._head_sizes(tp_size, cp_size, pp_size, ep_size)

    def _head_sizes(self, tp_size: int, cp_size: int, pp_size: int, ep_size: int) -> Iterator[RunConfig]:
        """Yield the Ulysses degrees that make sense: none, and as many ranks as a node has KV heads for."""
        groups = self.base.model.num_kv_heads // tp_size
        per_node = max(1, self.machine.cluster.gpus_per_node // tp_size)
        several = cp_size > per_node
        for head_size in {1, min(groups, per_node) if several else 1}:
            parallel = replace(
                self.base.parallel,
                tp_size=tp_size, cp_size=cp_size, pp_size=pp_size, ep_size=ep_size, cp_head_size=head_size,
            )  # fmt: skip
            exchange = replace(self.base.exchange, ranks_per_node=per_node if several else 0)
            config = replace(self.base, parallel=parallel, exchange=exchange)
            try:
                check_rules(config, world_size=self.world_size, has_gpu=True)
            except ValueError:
                continue
            yield config

    def _fitting(self, config: RunConfig) -> Iterator[Plan]:
        """Yield, for each number of chunks, the layout with the fewest memory switches that fits."""
        for layout in self._layouts(config):
            for switched in _switches(config):
                plan = plan_of(switched, self.world_size, layout, self.assumed)
                if self.smallest is None or plan.peak < self.smallest.peak:
                    self.smallest = plan
                if plan.peak <= self.assumed.usable_bytes:
                    yield plan
                    break

    def _layouts(self, config: RunConfig) -> Iterator[PipelineLayout]:
        """Yield the evenest layout in time for each number of chunks, and one that is even in bytes too."""
        pp_size = config.parallel.pp_size
        prices, sizes = layer_prices(config), layer_bytes(config, self.world_size)
        interleaves = num_microbatches(config, self.world_size) % pp_size == 0 and pp_size > 1
        seen: set[tuple[int, ...]] = set()
        for chunks in range(1, _MAX_CHUNKS + 1 if interleaves else 2):
            for spread in (10.0, 1.25, 1.1):
                found = best_layout(
                    prices, pp_size, chunks, layer_bytes=sizes, max_bytes=spread * sum(sizes) / pp_size
                )
                if found is not None and found not in seen:
                    seen.add(found)
                    yield PipelineLayout(sizes=found, pp_size=pp_size)

    def _rough_seconds(self, plan: Plan) -> float:
        """Estimate a step by prices alone: the slowest rank and the bubble."""
        config, prices = plan.config, layer_prices(plan.config)
        sums = [sum(prices[layer] for layer in layers) for layers in stages_of(plan.layout).layers]
        tokens = config.data.seq_len / config.parallel.cp_size
        packs = num_microbatches(config, self.world_size)
        bubble = (sum(sums) - max(sums)) / plan.layout.num_chunks
        return tokens * (packs * max(sums) + bubble) / config.parallel.tp_size


def _switches(config: RunConfig) -> Sequence[RunConfig]:
    """List memory switches from none to all, each step slower or coarser than the one before."""
    train, optim, exchange = config.train, config.optim, config.exchange
    full = replace(train, recompute=Recompute.full)
    offloaded = replace(full, offload_activations=True)
    short = replace(exchange, keep_for_backward=False)
    grads = replace(optim, grads_dtype=GradsDtype.bf16)
    moments = replace(grads, moments_dtype=MomentsDtype.bf16)
    half, whole = replace(moments, offload=0.5), replace(moments, offload=1.0)
    keeps = exchange if config.parallel.kv_exchange in (KvExchange.all_gather, KvExchange.ring) else short
    return [
        config,
        replace(config, train=full),
        replace(config, train=full, exchange=keeps),
        replace(config, train=offloaded, exchange=keeps),
        replace(config, train=full, optim=grads),
        replace(config, train=offloaded, exchange=keeps, optim=grads),
        replace(config, train=full, optim=moments),
        replace(config, train=offloaded, exchange=keeps, optim=moments),
        replace(config, train=offloaded, exchange=keeps, optim=half),
        replace(config, train=offloaded, exchange=keeps, optim=whole),
    ]
