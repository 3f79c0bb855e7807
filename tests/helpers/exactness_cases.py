"""Settings under which the exactness test compares several ranks with one process, one line each.

Every exchange meets every layout and every kind of stage; each setting of the exchange, Ulysses groups,
experts and each implementation of the attention occur. A case ends in -dense, -warm or -soft if its reference
is the one process of that kind.
"""

from dataclasses import dataclass
from typing import Any

from msa_train.config import (
    AttentionKernel,
    CpLayout,
    ExchangeConfig,
    Fusion,
    KvExchange,
    Recompute,
    StageAttention,
    StageConfig,
    StageRope,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison."""

    name: str
    world_size: int
    why: str
    "what only this case shows, in a few words"
    settings: dict[str, Any]
    "of `model_runs.small_config`; the rest as there"


def _case(name: str, world_size: int, why: str, **settings: Any) -> Case:
    return Case(name, world_size, why, settings)


ALL_GATHER, RING, AUTO = KvExchange.all_gather, KvExchange.ring, KvExchange.auto
ZIGZAG, DEALT = CpLayout.zigzag, CpLayout.dealt
FULL, SELECTIVE = Recompute.full, Recompute.selective
PLAIN, TILED = AttentionKernel.reference, AttentionKernel.cpu
DENSE = StageConfig(attention=StageAttention.dense)
# the rotary embedding of these is scaled besides, the KL loss softened
YARN = StageConfig(rope_type=StageRope.yarn, rope_factor=3.0, rope_original_length=32)
SOFT: dict[str, Any] = {"temperature": 1.5, "stage": YARN}
BROADCAST = ExchangeConfig()
NODES = ExchangeConfig(ranks_per_node=2)
NODES_WAITING = ExchangeConfig(ranks_per_node=2, overlap=False)
FETCH_AGAIN = ExchangeConfig(keep_for_backward=False, hot_share=0.0)
NODES_FETCH_AGAIN = ExchangeConfig(keep_for_backward=False, ranks_per_node=2)
SLICES = ExchangeConfig(query_slices=3)
SLICES_NODES = ExchangeConfig(query_slices=4, ranks_per_node=2)
SLICES_NODES_WAITING = ExchangeConfig(query_slices=4, ranks_per_node=2, overlap=False)
SLICES_FETCH_AGAIN = ExchangeConfig(query_slices=2, ranks_per_node=2, keep_for_backward=False)
SLICES_PLAIN = ExchangeConfig(query_slices=3, hot_share=0.0)
NO_BROADCAST = ExchangeConfig(hot_share=0.0)

# fmt: off
_TABLE = [
    _case("cp1-selected-ep1", 1, "the one process that sparse cases must equal, by the plain definitions",
          kernel=PLAIN),
    _case("cp1-selected-ep2", 2, "selected has nobody to talk to, experts over two", ep_size=2),
    _case("cp1-all_gather-ep1", 1, "all-gather has nobody to talk to", exchange=ALL_GATHER),
    _case("cp1-all_gather-ep2", 2, "all-gather has nobody to talk to, experts over two",
          ep_size=2, exchange=ALL_GATHER),
    _case("cp1-ring-ep1", 1, "ring has nobody to talk to", exchange=RING),
    _case("cp1-ring-ep2", 2, "ring has nobody to talk to, experts over two", ep_size=2, exchange=RING),
    _case("cp2-selected-ep1", 2, "selected over 2 ranks", cp_size=2),
    _case("cp2-selected-ep2", 2, "selected over 2 ranks, experts over two",
          cp_size=2, ep_size=2, layout=ZIGZAG),
    _case("cp2-all_gather-ep1", 2, "all-gather over 2 ranks", cp_size=2, exchange=ALL_GATHER),
    _case("cp2-all_gather-ep2", 2, "all-gather over 2 ranks, experts over two",
          cp_size=2, ep_size=2, exchange=ALL_GATHER, layout=ZIGZAG),
    _case("cp2-ring-ep1", 2, "ring over 2 ranks", cp_size=2, exchange=RING),
    _case("cp2-ring-ep2", 2, "ring over 2 ranks, experts over two",
          cp_size=2, ep_size=2, exchange=RING, layout=ZIGZAG),
    _case("cp3-selected-ep1", 3, "selected over 3 ranks", cp_size=3),
    _case("cp3-selected-ep2", 6, "selected over 3 ranks, experts over two",
          cp_size=3, ep_size=2, layout=DEALT),
    _case("cp3-all_gather-ep1", 3, "all-gather over 3 ranks", cp_size=3, exchange=ALL_GATHER),
    _case("cp3-all_gather-ep2", 6, "all-gather over 3 ranks, experts over two",
          cp_size=3, ep_size=2, exchange=ALL_GATHER, layout=DEALT),
    _case("cp3-ring-ep1", 3, "ring over 3 ranks", cp_size=3, exchange=RING),
    _case("cp3-ring-ep2", 6, "ring over 3 ranks, experts over two",
          cp_size=3, ep_size=2, exchange=RING, layout=DEALT),
    _case("cp4-selected-ep1", 4, "selected over 4 ranks", cp_size=4),
    _case("cp4-selected-ep2", 4, "selected over 4 ranks, experts over two, broadcasts",
          cp_size=4, ep_size=2, layout=ZIGZAG, settings=BROADCAST),
    _case("cp4-all_gather-ep1", 4, "all-gather over 4 ranks", cp_size=4, exchange=ALL_GATHER),
    _case("cp4-all_gather-ep2", 4, "all-gather over 4 ranks, experts over two",
          cp_size=4, ep_size=2, exchange=ALL_GATHER, layout=ZIGZAG),
    _case("cp4-ring-ep1", 4, "ring over 4 ranks", cp_size=4, exchange=RING),
    _case("cp4-ring-ep2", 4, "ring over 4 ranks, experts over two",
          cp_size=4, ep_size=2, exchange=RING, layout=ZIGZAG),
    _case("cp2-selected-recompute", 2, "selected, recomputed, no balancing, fetched again",
          cp_size=2, recompute=FULL, balance=(False, False), settings=FETCH_AGAIN),
    _case("cp2-all_gather-recompute", 2, "all-gather, recomputed, no balancing",
          cp_size=2, exchange=ALL_GATHER, recompute=FULL, balance=(False, False)),
    _case("cp2-ring-recompute", 2, "ring, recomputed, no balancing",
          cp_size=2, exchange=RING, recompute=FULL, balance=(False, False)),
    _case("cp4-selected-ep4", 4, "two nodes of two ranks, experts over all four",
          cp_size=4, ep_size=4, settings=NODES),
    _case("cp2-selected-ep4-dp2", 4, "experts over context and data parallel ranks", cp_size=2, ep_size=4),
    _case("cp1-selected-ep1-tiles", 1, "experts and feed-forward layer over tiles, the last one short",
          tile_tokens=25),
    _case("cp2-selected-ep2-tiles", 2, "tiles, experts over two", cp_size=2, ep_size=2, tile_tokens=20),
    _case("cp2-selected-ep2-tiles-recompute", 2, "tiles in recomputed layers: one forward pass is left out",
          cp_size=2, ep_size=2, recompute=FULL, tile_tokens=20),
    _case("cp4-selected-ep4-tiles-recompute", 4, "tiles, one of them of padding alone, experts over four",
          cp_size=4, ep_size=4, recompute=FULL, tile_tokens=6, layout=ZIGZAG),
    _case("cp2-selected-ep4-dp2-tiles-soft", 4, "tiles, experts over data parallel ranks too, softened KL",
          cp_size=2, ep_size=4, tile_tokens=16, **SOFT),
    _case("cp2-ring-tiles-warm", 2, "tiles, the index branch warms up",
          cp_size=2, exchange=RING, stage=DENSE, temperature=1.5, tile_tokens=7),
    _case("cp3-selected-heads3", 3, "one Ulysses group: each rank has one KV head, no block travels",
          cp_size=3, head_size=3),
    _case("cp6-selected-heads3", 6, "Ulysses groups of three, selected between two of them",
          cp_size=6, head_size=3),
    _case("cp6-all_gather-heads3", 6, "Ulysses groups of three, all-gather between two of them",
          cp_size=6, head_size=3, exchange=ALL_GATHER, layout=ZIGZAG),
    _case("cp6-ring-heads3", 6, "Ulysses groups of three, ring between two of them",
          cp_size=6, head_size=3, exchange=RING, layout=DEALT),
    _case("cp6-selected-heads3-recompute-warm", 6, "Ulysses groups, recomputed, the index branch warms up",
          cp_size=6, head_size=3, recompute=FULL, stage=DENSE, temperature=1.5),
    _case("cp2-selected-dense", 2, "selected, full attention everywhere", cp_size=2, stage=DENSE),
    _case("cp2-all_gather-dense", 2, "all-gather, full attention everywhere",
          cp_size=2, exchange=ALL_GATHER, stage=DENSE),
    _case("cp2-ring-dense", 2, "ring, full attention everywhere", cp_size=2, exchange=RING, stage=DENSE),
    _case("cp3-selected-dense", 3, "selected, full attention everywhere",
          cp_size=3, stage=DENSE, layout=ZIGZAG),
    _case("cp3-all_gather-dense", 3, "all-gather, full attention everywhere",
          cp_size=3, exchange=ALL_GATHER, stage=DENSE, layout=ZIGZAG),
    _case("cp3-ring-dense", 3, "ring, full attention everywhere",
          cp_size=3, exchange=RING, stage=DENSE, layout=ZIGZAG),
    _case("cp2-selected-warm", 2, "selected, the index branch warms up",
          cp_size=2, stage=DENSE, temperature=1.5, layout=DEALT),
    _case("cp2-all_gather-warm", 2, "all-gather, the index branch warms up",
          cp_size=2, exchange=ALL_GATHER, stage=DENSE, temperature=1.5, layout=DEALT),
    _case("cp2-ring-warm", 2, "ring, the index branch warms up",
          cp_size=2, exchange=RING, stage=DENSE, temperature=1.5, layout=DEALT),
    _case("cp3-selected-warm", 3, "selected, the index branch warms up",
          cp_size=3, stage=DENSE, temperature=1.5),
    _case("cp3-all_gather-warm", 3, "all-gather, the index branch warms up",
          cp_size=3, exchange=ALL_GATHER, stage=DENSE, temperature=1.5),
    _case("cp3-ring-warm", 3, "ring, the index branch warms up",
          cp_size=3, exchange=RING, stage=DENSE, temperature=1.5),
    _case("cp2-selected-soft", 2, "selected, softened KL loss", cp_size=2, **SOFT, layout=ZIGZAG),
    _case("cp2-all_gather-soft", 2, "all-gather, softened KL loss",
          cp_size=2, exchange=ALL_GATHER, **SOFT, layout=ZIGZAG),
    _case("cp2-ring-soft", 2, "ring, softened KL loss",
          cp_size=2, exchange=RING, **SOFT, layout=ZIGZAG),
    _case("cp3-selected-soft", 3, "selected, softened KL loss, fetched again",
          cp_size=3, **SOFT, layout=DEALT, settings=FETCH_AGAIN),
    _case("cp3-all_gather-soft", 3, "all-gather, softened KL loss",
          cp_size=3, exchange=ALL_GATHER, **SOFT, layout=DEALT),
    _case("cp3-ring-soft", 3, "ring, softened KL loss",
          cp_size=3, exchange=RING, **SOFT, layout=DEALT),
    _case("cp1-dense", 1, "the same for full attention everywhere", stage=DENSE, kernel=PLAIN),
    _case("cp1-warm", 1, "the same for the warm-up of the index branch",
          stage=DENSE, temperature=1.5, kernel=PLAIN),
    _case("cp1-soft", 1, "the same for a softened KL loss, yarn", **SOFT, kernel=PLAIN),
    _case("cp2-selected-ep2-recompute-warm", 2, "experts, recomputed, the index branch warms up",
          cp_size=2, ep_size=2, recompute=FULL, layout=ZIGZAG, stage=DENSE, temperature=1.5),
    _case("cp2-selected-cpu", 2, "the tiled CPU path by name", cp_size=2, kernel=TILED),
    _case("cp3-selected-reference", 3, "the plain definitions over several ranks", cp_size=3, kernel=PLAIN),
    _case("cp2-ring-reference-soft", 2, "the plain definitions over a ring, recomputed, softened KL",
          cp_size=2, exchange=RING, **SOFT, recompute=FULL, kernel=PLAIN),
    _case("cp4-selected-ep4-again", 4, "a second run, bit by bit the same",
          cp_size=4, ep_size=4, settings=NODES),
    _case("cp4-selected-ep4-waiting", 4, "no overlap: the same bits",
          cp_size=4, ep_size=4, settings=NODES_WAITING),
    _case("cp4-hot-again-recompute", 4, "nodes, broadcasts and fetching again in the backward pass",
          cp_size=4, recompute=FULL, settings=NODES_FETCH_AGAIN),
    _case("cp4-auto-nodes", 4, "`auto` decides for each layer call, on two nodes",
          cp_size=4, exchange=AUTO, settings=NODES),
    _case("cp2-auto-recompute-warm", 2, "`auto` decides for full attention",
          cp_size=2, exchange=AUTO, recompute=FULL, stage=DENSE, temperature=1.5),
    _case("cp2-selected-ep2-selective", 2, "every part recomputed by itself, experts over two, nodes of one",
          cp_size=2, ep_size=2, recompute=SELECTIVE, layout=ZIGZAG),
    _case("cp3-selected-selective-offload-warm", 3, "the same, kept on the host, the index branch warms up",
          cp_size=3, recompute=SELECTIVE, offload=True, stage=DENSE, temperature=1.5),
    _case("cp6-selected-heads3-selective", 6, "attention recomputed by itself in Ulysses groups",
          cp_size=6, head_size=3, recompute=SELECTIVE, modules="attention", settings=FETCH_AGAIN),
    _case("cp2-selected-ep2-offload", 2, "all that layers keep waits on the host",
          cp_size=2, ep_size=2, offload=True),
    _case("cp2-all_gather-recompute-offload", 2, "inputs of recomputed layers wait on the host",
          cp_size=2, exchange=ALL_GATHER, recompute=FULL, offload=True),
    _case("cp2-selected-slices", 2, "queries select in three slices", cp_size=2, settings=SLICES),
    _case("cp3-selected-slices-soft", 3, "slices, dealt shards, softened KL loss",
          cp_size=3, layout=DEALT, **SOFT, settings=SLICES),
    _case("cp4-selected-slices", 4, "slices on two nodes, broadcasts, experts over all four",
          cp_size=4, ep_size=4, settings=SLICES_NODES),
    _case("cp4-selected-slices-again", 4, "a second run, bit by bit the same",
          cp_size=4, ep_size=4, settings=SLICES_NODES),
    _case("cp4-selected-slices-waiting", 4, "no overlap: the same bits",
          cp_size=4, ep_size=4, settings=SLICES_NODES_WAITING),
    _case("cp4-slices-zigzag-recompute", 4, "slices of zigzag shards on nodes, recomputed, fetched again",
          cp_size=4, layout=ZIGZAG, recompute=FULL, settings=SLICES_FETCH_AGAIN),
    _case("cp2-slices-selective", 2, "slices, attention recomputed by itself",
          cp_size=2, recompute=SELECTIVE, modules="attention", settings=SLICES),
    _case("cp4-slices-selective-again", 4, "the same on nodes, fetched again, experts over two",
          cp_size=4, ep_size=2, layout=ZIGZAG, recompute=SELECTIVE, modules="attention",
          settings=SLICES_FETCH_AGAIN),
    _case("cp4-slices-unmoved", 4, "slices of queries that select at home",
          cp_size=4, balance=(False, True), settings=SLICES_NODES),
    _case("cp6-selected-slices-heads3", 6, "slices in Ulysses groups",
          cp_size=6, head_size=3, settings=SLICES),
    _case("cp6-selected-slices-nodes", 6, "slices over three nodes", cp_size=6, settings=SLICES_NODES),
    _case("cp4-auto-slices", 4, "`auto` chooses by the call before, on two nodes",
          cp_size=4, exchange=AUTO, settings=SLICES_NODES),
    _case("cp4-auto-gathers", 4, "`auto` gathers before the scoring from the second call on",
          cp_size=4, exchange=AUTO, settings=SLICES_NODES),
    _case("cp3-selected-plain", 3, "nothing is broadcast", cp_size=3, settings=NO_BROADCAST),
    _case("cp3-selected-plain-slices", 3, "slices: the same bits as in one piece",
          cp_size=3, settings=SLICES_PLAIN),
    _case("cp2-selected-ep2-fused", 2, "the formulas of fused functions, which are compiled on GPUs",
          cp_size=2, ep_size=2, recompute=SELECTIVE, fusion=Fusion.compile),
    _case("cp3-selected-ep1-again", 3, "a second run, bit by bit the same", cp_size=3),
    _case("cp3-selected-ep1-unmoved", 3, "queries select their blocks at home: the same bits",
          cp_size=3, balance=(False, True)),
    _case("cp3-ring-warm-again", 3, "a second run, bit by bit the same",
          cp_size=3, exchange=RING, stage=DENSE, temperature=1.5),
]
# fmt: on
CASES = {case.name: case for case in _TABLE}
REFERENCES = {"": "cp1-selected-ep1", "-dense": "cp1-dense", "-warm": "cp1-warm", "-soft": "cp1-soft"}
"the one process that a case is compared with, by what its name holds"
