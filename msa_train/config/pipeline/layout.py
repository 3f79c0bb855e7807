"""Resolve `parallel.pp_layout`: which layers stand on which pipeline rank."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.config.pipeline.partition import best_layout, even_layout, rank_sums
from msa_train.config.pipeline.prices import LayerRates, layer_prices
from msa_train.config.pipeline.state_bytes import layer_bytes
from msa_train.config.run import RunConfig
from msa_train.config.staging.views import stages_of_layout

EVEN, AUTO = "even", "auto"
_NUMBERS = re.compile(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*")
_GOOD_BALANCE = 1.05
"slowest rank over mean at which `auto` takes no more chunks: each chunk keeps more activations alive"
_WORTH_A_CHUNK = 0.01
"of the same ratio, that another chunk must gain"
_MAX_CHUNKS = 4
_STATE_SPREAD = 1.15
"most bytes of weights and optimizer state on a rank in `auto`, over the mean: GPUs are of one size"
_MOST_INTERLEAVED_LAYERS = 256
"in `auto`: above it only contiguous stages are looked at, as the search would take minutes"


@dataclass(kw_only=True, slots=True, frozen=True)
class PipelineLayout:
    """Hold the layers of every chunk of a pipeline."""

    sizes: tuple[int, ...]
    "[pp_size * num_chunks] layers of each chunk, in the order of the layers; chunk i is on rank i % pp_size"
    pp_size: int
    "pipeline ranks"

    @property
    def num_chunks(self) -> int:
        """Return the model chunks of a rank; more than 1: the pipeline is interleaved."""
        return len(self.sizes) // self.pp_size

    @property
    def is_even(self) -> bool:
        """Tell whether every rank has one chunk, all of one size."""
        return self.num_chunks == 1 and len(set(self.sizes)) == 1

    def layers(self, rank: int, chunk: int) -> range:
        """Return the layers of one chunk, counted from 0.

        Example: sizes 1, 2, 3, 4 on two ranks: rank 1 has layers 1 and 2 in chunk 0 and 6 to 9 in chunk 1.
        """
        place = chunk * self.pp_size + rank
        first = sum(self.sizes[:place])
        return range(first, first + self.sizes[place])

    def __str__(self) -> str:
        """Write it as `parallel.pp_layout` takes it: "13,17,17,13"."""
        return ",".join(map(str, self.sizes))


def parse_numbers(text: str) -> tuple[int, ...] | None:
    """Read layers per stage, "13,17,17,13" -> 13, 17, 17, 13; None where it is something else."""
    return tuple(int(part) for part in text.split(",")) if _NUMBERS.fullmatch(text) else None


def num_microbatches(config: RunConfig, world_size: int) -> int:
    """Return the packs of a step that pass through a pipeline: those of one data-parallel rank."""
    parallel = config.parallel
    dp_size = world_size // (parallel.tp_size * parallel.pp_size * parallel.cp_size)
    return config.train.global_batch_size // max(dp_size, 1)


def resolve_layout(config: RunConfig, world_size: int, rates: LayerRates | None = None) -> PipelineLayout:
    """Return the layout that `parallel.pp_layout` stands for; the same on every rank.

    `auto` prices layers at the longest packs, one document each, and takes the fewest chunks per rank with
    which the slowest rank is within 5% of the mean, else the evenest found. No rank gets more than 1.15 times
    the mean of weights and optimizer state where that can be had. Without as many packs per step as
    interleaving needs, it stays with one chunk. It takes 2 ms to 3 s, once at start.

    Args:
        config: of the run, its rules checked.
        world_size: ranks of the job.
        rates: of the device, for `auto`; None: those assumed of an H100.

    Example: M3 at 200K tokens with pp_size 4, auto -> 12,16,17,15.
    """
    model, parallel, text = config.model, config.parallel, config.parallel.pp_layout.strip()
    numbers = parse_numbers(text)
    if numbers is not None:
        return PipelineLayout(sizes=numbers, pp_size=parallel.pp_size)
    if text != AUTO or parallel.pp_size == 1:
        return PipelineLayout(sizes=even_layout(model.num_layers, parallel.pp_size), pp_size=parallel.pp_size)
    return PipelineLayout(sizes=_choose(config, world_size, rates), pp_size=parallel.pp_size)


def _choose(config: RunConfig, world_size: int, rates: LayerRates | None) -> tuple[int, ...]:
    """Choose the layers per chunk of `auto`."""
    pp_size, prices = config.parallel.pp_size, layer_prices(config, rates=rates)
    sizes = layer_bytes(config, world_size)
    most = _STATE_SPREAD * sum(sizes) / pp_size
    interleaves = _all_interleave(config, world_size) and len(prices) <= _MOST_INTERLEAVED_LAYERS
    chosen: tuple[int, ...] | None = None
    balance = float("inf")
    for chunks in range(1, (_MAX_CHUNKS if interleaves else 1) + 1):
        found = best_layout(prices, pp_size, chunks, layer_bytes=sizes, max_bytes=most)
        if found is not None and imbalance(prices, found, pp_size) < balance - _WORTH_A_CHUNK:
            chosen, balance = found, imbalance(prices, found, pp_size)
        if balance <= _GOOD_BALANCE:
            break
    # where one layer is more than a rank's share of the bytes, speed alone decides
    return chosen or best_layout(prices, pp_size) or even_layout(len(prices), pp_size)


def _all_interleave(config: RunConfig, world_size: int) -> bool:
    """Tell whether every step of this layout's stages has as many packs as interleaving needs."""
    parallel = config.parallel
    dp_size = max(world_size // (parallel.tp_size * parallel.pp_size * parallel.cp_size), 1)
    batches = {
        batch
        for stage in stages_of_layout(config)
        for batch in (stage.global_batch_size, stage.alternate.global_batch_size)
    }
    return all(batch // dp_size % parallel.pp_size == 0 for batch in batches)


def imbalance(values: Sequence[float], sizes: Sequence[int], pp_size: int) -> float:
    """Return the sum of the rank that has most, over the mean of ranks: 1 where all are equal."""
    sums = rank_sums(values, sizes, pp_size)
    return max(sums) * pp_size / sum(sums)


def describe_layout(config: RunConfig, world_size: int) -> list[str]:
    """Write the layout with the price of each stage for `--check`; nothing without a pipeline.

    Example of one line: "rank 0: layers 1 to 12, 41.2 us per token (0.99 of the mean), 48.1 GB of weights and
    optimizer state".
    """
    pp_size = config.parallel.pp_size
    if pp_size == 1:
        return []
    layout = resolve_layout(config, world_size)
    prices, sizes = layer_prices(config), layer_bytes(config, world_size)
    sums, bytes_of = (rank_sums(values, layout.sizes, pp_size) for values in (prices, sizes))
    mean = sum(sums) / pp_size
    packs, chunks = num_microbatches(config, world_size), layout.num_chunks
    bubble = (pp_size - 1) / (chunks * packs + pp_size - 1) if packs else 0.0
    lines = [
        f"pipeline: parallel.pp_layout={layout}, {chunks} chunk{'s' * (chunks > 1)} per rank; slowest rank "
        f"{max(sums) / mean:.2f} of the mean by assumed rates; {packs} packs per step, {bubble:.0%} bubble"
    ]
    for rank in range(pp_size):
        layers = " and ".join(_range(layout.layers(rank, chunk)) for chunk in range(chunks))
        lines.append(
            f"  rank {rank}: layers {layers}, {sums[rank] * 1e6:.3g} us per token "
            f"({sums[rank] / mean:.2f} of the mean), {bytes_of[rank] / 1e9:.3g} GB of weights and optimizer "
            "state per GPU"
        )
    return lines


def _range(layers: range) -> str:
    """Write layers, counted from 1: range(0, 12) -> "1 to 12"."""
    return f"{layers[0] + 1} to {layers[-1] + 1}" if len(layers) > 1 else f"{layers[0] + 1}"
