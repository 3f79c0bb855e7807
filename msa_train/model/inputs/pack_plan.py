"""Plan on the host, with integers alone, how one pack is trained on this rank.

First all decisions (this file), then one copy to the device (`plan_to_device`), then the forward pass.
Nothing here needs a process group or a device, so plans of any rank of any layout can be made anywhere.

At 1M tokens on 256 ranks a plan holds 33 bytes for each of this rank's 4,096 tokens, 0.13 MiB, 64 KiB of
block ids and, where queries move for equal work, up to 32 bytes for each of them. Full attention adds 8 bytes
for each token that this rank sends or fetches, and planning it takes most of the time.
"""

from dataclasses import dataclass

from msa_train.config import AttentionKind, RunConfig, Stage, StageAttention
from msa_train.data import Pack
from msa_train.model.inputs.pack_shard import PackShard, make_pack_shard
from msa_train.parallel.attention.selection_recall import RecallQueries, sample_queries
from msa_train.parallel.kv_exchange.slices.begin import num_query_slices
from msa_train.parallel.sharding.load_balance import unit_tokens
from msa_train.parallel.sharding.partition import make_partition, merge_ranks
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.parallel.sharding.ulysses import Order, token_order


@dataclass(slots=True)
class UlyssesInputs:
    """Hold inputs of attention where neighbouring ranks trade tokens for KV heads (`cp_head_size` > 1)."""

    pack: PackShard
    "the tokens of all ranks of the Ulysses group"
    recall: RecallQueries | None
    "sampled queries among these tokens"
    order: Order
    "of gathered tokens, see `ulysses.token_order`"


@dataclass(slots=True)
class PackPlan:
    """Hold everything about one pack that integers can say, for one rank."""

    shard: PackShard
    "the tokens of this rank"
    recall: RecallQueries | None
    "queries whose selection is compared with full attention; None: of none"
    ulysses: UlyssesInputs | None
    "what attention runs on instead of `shard` and `recall`; None where cp_head_size is 1"

    @property
    def attended(self) -> PackShard:
        """Give the tokens that attention runs on."""
        return self.shard if self.ulysses is None else self.ulysses.pack


def shard_layout(config: RunConfig, pack: Pack, cp_rank: int, ulysses_size: int = 1) -> ShardLayout:
    """Decide which tokens of a pack a rank holds; with `ulysses_size`, which its Ulysses group holds."""
    block_size, cp_size = config.attention.block_size, config.parallel.cp_size
    plan = make_partition(config.parallel.cp_layout, cp_size, pack.cu_seqlens.tolist(), block_size)
    # A Ulysses group holds what its ranks hold together, and takes part in the exchange as one rank does.
    return ShardLayout(
        seq_len=len(pack.tokens),
        block_size=block_size,
        cp_rank=cp_rank // ulysses_size,
        cp_size=cp_size // ulysses_size,
        split=plan if ulysses_size == 1 else merge_ranks(plan, ulysses_size),
    )


def plan_pack(
    config: RunConfig, stage: Stage, pack: Pack, cp_rank: int, recall_seed: int | None = None
) -> PackPlan:
    """Plan one pack for one context-parallel rank; the same decisions on every rank.

    Args:
        config: the whole run.
        stage: of the run; decides what MSA layers attend to.
        pack: the whole pack.
        cp_rank: this rank among those that share the pack.
        recall_seed: draw queries whose selection is compared with full attention; None: none.

    Returns:
        The plan, its tensors on the host.
    """
    layout, size = shard_layout(config, pack, cp_rank), config.parallel.cp_head_size
    with_full = attends_fully(config, stage)
    if size == 1:
        shard = make_pack_shard(
            pack, layout, config.parallel, with_full=with_full, num_slices=_num_slices(config, layout)
        )
        return PackPlan(shard, _sample(config, stage, pack, layout, recall_seed), None)
    merged = shard_layout(config, pack, cp_rank, size)
    ulysses = UlyssesInputs(
        pack=make_pack_shard(
            pack, merged, config.parallel, with_full=with_full, num_slices=_num_slices(config, merged)
        ),
        recall=_sample(config, stage, pack, merged, recall_seed),
        order=token_order(layout.plan, merged.cp_rank * size, size),
    )
    # attention runs on the group's tokens, so they alone have the plan for it
    return PackPlan(make_pack_shard(pack, layout, config.parallel, with_full=False), None, ulysses)


def _num_slices(config: RunConfig, layout: ShardLayout) -> int:
    """Decide in how many slices queries select blocks."""
    return num_query_slices(
        config.exchange,
        config.parallel.kv_exchange,
        layout.cp_size,
        layout.local_seq_len,
        unit_tokens(config.attention.block_size),
    )


def attends_fully(config: RunConfig, stage: Stage) -> bool:
    """Tell whether some layer attends to everything in this stage."""
    dense = stage.attention is StageAttention.dense
    return dense or AttentionKind.full in config.model.attention_kinds()


def _sample(
    config: RunConfig, stage: Stage, pack: Pack, layout: ShardLayout, seed: int | None
) -> RecallQueries | None:
    if seed is None:
        return None
    return sample_queries(
        pack.cu_seqlens.tolist(),
        pack.doc_lengths.tolist(),
        layout,
        topk=stage.topk,
        count=config.logging.attention_queries,
        seed=seed,
    )
