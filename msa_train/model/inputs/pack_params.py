"""Carry what layers must know about a pack through Megatron, in the place of its PackedSeqParams.

Layers keep no state between calls: pipeline schedules and recomputation run them out of order, so all that a
layer needs to know about its input comes with the input.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from msa_train.config import KvExchange, StageAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_plan import UlyssesInputs
from msa_train.model.inputs.pack_shard import PackShard
from msa_train.model.layers.offload import OffloadChain
from msa_train.parallel.attention.selection_recall import RecallQueries
from msa_train.parallel.comm.cp_groups import CpGroups
from msa_train.parallel.kv_exchange.requests import ExchangeDecision

if TYPE_CHECKING:
    from msa_train.model.layers.moe.routing import Routing

OnSelection = Callable[[int, Tensor], None]
"is told a layer number and its block ids [T, M, topk]"


@dataclass(slots=True)
class SelectionRecord:
    """Hold the decisions of a layer in its forward pass, for its recomputation."""

    calls: int = 0
    "how often the layer has run; from the second time on it replays and counts nothing"
    block_indices: Tensor | None = None
    "[T, M, topk] int32 selected blocks"
    exchange: ExchangeDecision | None = None
    "how KV blocks came"
    routing: "Routing | None" = None
    "which experts the tokens went to"

    @property
    def replaying(self) -> bool:
        """Tell whether the layer is being recomputed."""
        return self.calls > 1


@dataclass(slots=True, frozen=True)
class PackContext:
    """Hold all that the layers are told about a pack. T local tokens, M KV heads."""

    pack: PackShard
    "the tokens of this rank; within attention over Ulysses groups, those of the group"
    comm: CpGroups
    rotary: tuple[Tensor, Tensor]
    "cos and sin [T, rotary_dim / 2] of the tokens' document positions"
    kl_weight: float
    "factor of the sum of divergences; 0: no KL loss"
    attention: StageAttention
    "what MSA layers attend to in this stage of the run"
    topk: int
    "blocks that a query selects in this stage"
    stats: LayerStats
    "where layers leave figures"
    padding_mask: Tensor
    "[1, tokens of this tensor-parallel rank] bool, True for padding"
    with_kl_value: bool = True
    "the KL loss's value is wanted, and not its gradient alone"
    recall: RecallQueries | None = None
    "queries whose selection MSA layers compare with full attention; None: of none"
    full_exchange: KvExchange | None = None
    "what `kv_exchange=auto` means for full attention over this pack; None: as configured"
    on_selection: OnSelection | None = None
    "is told every MSA layer's selection; None: nobody asks"
    ulysses: UlyssesInputs | None = None
    "what attention runs on instead of `pack` and `recall`; None where cp_head_size is 1"
    offload: OffloadChain = field(default_factory=OffloadChain)
    "the layers of this micro-batch whose kept tensors wait in host memory"
    ulysses_rank: int = 0
    "which share of the KV heads this is, within attention over Ulysses groups"

    def of_ulysses_group(self) -> "PackContext":
        """Return what attention runs on after tokens were traded for KV heads; sums are shared."""
        assert self.ulysses is not None, "called where there are Ulysses groups"
        assert self.comm.ulysses is not None, "Ulysses inputs come with their group"
        return replace(
            self,
            pack=self.ulysses.pack,
            recall=self.ulysses.recall,
            ulysses=None,
            ulysses_rank=self.comm.ulysses.rank,
        )


@dataclass(kw_only=True)
class PackParams(PackedSeqParams):
    """Hold a pack on its way through the layers."""

    context: PackContext
    "the same for all layers"
    record: SelectionRecord = field(default_factory=SelectionRecord)
    "of one layer"


def tensor_parallel_padding(valid: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Mask padding among the tokens that sequence parallelism leaves here: [T] -> [1, T / tp_size] bool.

    Example: valid [1, 1, 1, 0], tp_rank 1 of 2 -> [[False, True]].
    """
    return ~torch.chunk(valid, tp_size)[tp_rank].unsqueeze(0)
