"""What travels with a pack through Megatron's layers, in the place of its PackedSeqParams.

Layers keep no state between calls: pipeline schedules and recomputation run them out of order, so all that a
layer needs to know about its input comes with the input.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from msa_train.config import KvExchange, StageAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_shard import PackShard
from msa_train.parallel.attention.selection_recall import RecallQueries
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.kv_exchange.requests import ExchangeDecision
from msa_train.parallel.sharding.ulysses import Order


@dataclass(slots=True)
class SelectionRecord:
    """What a layer decided in its forward pass, for its recomputation.

    calls: how often the layer has run; from the second on it replays and counts nothing.
    """

    calls: int = 0
    block_indices: Tensor | None = None
    requests: ExchangeDecision | None = None

    @property
    def replaying(self) -> bool:
        """True while the layer is recomputed."""
        return self.calls > 1


@dataclass(slots=True)
class UlyssesInputs:
    """What attention runs on where neighbouring ranks trade tokens for KV groups (`cp_head_size` > 1).

    pack: the tokens of all ranks of the head group; recall: its sampled queries; order: see
    `head_exchange.token_order`.
    """

    pack: PackShard
    recall: RecallQueries | None
    order: Order


@dataclass
class PackParams(PackedSeqParams):
    """A pack on its way through the layers.

    rotary: cos and sin [T, rotary_dim / 2] of the local tokens' document positions.
    kl_weight: factor of the sum of divergences, 0 when the KL loss is off.
    attention: what MSA layers attend to in this stage of the run.
    padding_mask: [1, tokens of this tensor-parallel rank] bool, True for padding.
    recall: queries of which MSA layers compare the selection with full attention; None: of none.
    full_exchange: what `kv_exchange=auto` means for dense attention over this pack; None: as configured.
    on_selection: is told every MSA layer's number and block ids [T, M, topk]; None: nobody asks.
    heads: what attention runs on instead of pack, comm and recall; None where cp_head_size is 1.
    head_rank: which share of the KV groups this is, where the pack is the head group's.
    """

    pack: PackShard | None = None
    comm: CpComm | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    kl_weight: float = 0.0
    attention: StageAttention = StageAttention.sparse
    stats: LayerStats = field(default_factory=LayerStats)
    record: SelectionRecord = field(default_factory=SelectionRecord)
    padding_mask: Tensor | None = None
    recall: RecallQueries | None = None
    full_exchange: KvExchange | None = None
    on_selection: Callable[[int, Tensor], None] | None = None
    heads: UlyssesInputs | None = None
    head_rank: int = 0

    def of_head_group(self) -> "PackParams":
        """The same with pack, comm and recall of the head group; records and sums are shared."""
        assert self.heads is not None, "called where there are head groups"
        assert self.comm is not None, "the step fills in the collectives"
        shared = copy.copy(self)
        shared.pack, shared.comm = self.heads.pack, self.comm.sequence
        shared.recall, shared.heads = self.heads.recall, None
        shared.head_rank = 0 if self.comm.heads is None else self.comm.heads.rank
        return shared


def tensor_parallel_padding(valid: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Padding mask of the tokens that sequence parallelism leaves on this rank: [T] -> [1, T / tp_size]."""
    return ~torch.chunk(valid, tp_size)[tp_rank].unsqueeze(0)
