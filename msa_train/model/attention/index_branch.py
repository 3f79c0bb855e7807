"""Project index queries and keys, whose scores select the blocks of MSA.

The index keys of all tokens go to every rank, 2 * Di bytes a token in bf16: 256 MiB per layer at 1M tokens,
whatever the number of ranks. Keys and values of all tokens would be 8 times that (M = 4, D = Di = 128).

Shapes: T local tokens, P ranks, M KV heads on this tensor-parallel rank, Di index head dim, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from msa_train.model.layers.norm import RMSNorm, norm_and_rotate
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.parallel.sharding.ulysses import PendingTrade


def is_index_parameter(name: str) -> bool:
    """Tell whether a parameter of this name in the model belongs to an index branch."""
    return ".index_branch." in name


class IndexBranch(MegatronModule):
    """Project to one index query head per KV head and one index key head shared by all of them.

    Projection, RMS norm, partial rotary embedding, as the released model has them. The input is detached: the
    KL loss trains this branch and nothing else, and nothing else trains it.
    """

    config: MsaTransformerConfig

    def __init__(self, config: MsaTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config)
        tp_size = pg_collection.tp.size()
        self.tp_group = pg_collection.tp
        self.num_local_kv_heads = config.model.num_kv_heads // tp_size
        self.head_dim = config.attention.index_head_dim
        dtype, hidden = config.params_dtype, config.hidden_size
        self.linear_q = nn.Linear(hidden, self.num_local_kv_heads * self.head_dim, bias=False, dtype=dtype)
        self.linear_k = nn.Linear(hidden, self.head_dim, bias=False, dtype=dtype)
        self.q_norm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
        self.k_norm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
        if tp_size > 1:
            self.linear_q.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.linear_q.weight.partition_dim = 0  # type: ignore[attr-defined]
            self.linear_q.weight.partition_stride = 1  # type: ignore[attr-defined]
            # Each rank has the gradient from its own KV heads only; Megatron sums over tensor-parallel ranks
            # what is marked so.
            self.linear_k.weight.sequence_parallel = True  # type: ignore[attr-defined]
        if config.attention.kl_weight == 0:
            self.requires_grad_(False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Project hidden states [T, 1, H] -> q_index [T, M, Di], k_index [T, Di], in their dtype.

        With tensor parallelism hidden is this rank's part, [T / tp_size, 1, H]. rotary: cos and sin of the
        tokens.
        """
        # The loss of the index branch must not train what lies below it.
        x = hidden.detach()
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        x = x.squeeze(1)
        q = self.linear_q(x).view(x.shape[0], self.num_local_kv_heads, self.head_dim)
        q = norm_and_rotate(self.q_norm, q, rotary, is_fused=self.config.is_fused)
        return q, norm_and_rotate(self.k_norm, self.linear_k(x), rotary, is_fused=self.config.is_fused)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Make the checkpoint entries: the query projection is cut by KV head over tensor-parallel ranks."""
        state: dict[str, torch.Tensor] = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"linear_q.weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


@dataclass(slots=True)
class PendingIndexKeys:
    """Hold index queries and keys, and the keys of all ranks on their way."""

    q: Tensor
    "[T, M, Di] index queries of this rank's tokens"
    k: Tensor
    "[T, Di] index keys of this rank's tokens"
    all_keys: Pending[Tensor] | None
    "[P, T, Di] detached index keys of all ranks; None where none are needed"
    layout: ShardLayout
    "order of the tokens of `all_keys`"
    traded: PendingTrade | None = None
    "index queries on their way to the ranks of their KV heads; None without Ulysses groups"
