"""Attend to the last tokens of a document, and to its first ones."""

from msa_kernels import window_blocks
from torch import Tensor

from msa_train.model.attention.base import AttentionInputs, GroupedQueryAttention
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention


class WindowSelfAttention(GroupedQueryAttention):
    """Run a causal sliding window within documents, with a sink: position decides which blocks travel."""

    def attend(self, inputs: AttentionInputs, context: PackContext, record: SelectionRecord) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, attention = context.pack, self.config.attention
        block_indices, window = window_blocks(
            pack.position,
            pack.position - pack.doc_position,
            block_size=attention.block_size,
            num_blocks=pack.layout.num_blocks,
            window=attention.window,
            sink_blocks=attention.window_sink,
            query_valid=pack.valid,
        )
        # All KV heads see the same blocks; blocks follow from positions, but the exchange is that of MSA
        # layers.
        call = SparseAttentionArgs(
            block_indices=block_indices[:, None].expand(-1, inputs.k.shape[1], -1),
            position=pack.position,
            layout=pack.layout,
            comm=self.kv_comm(context),
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            settings=self.config.exchange,
            decision=record.exchange,
            window=window,
            kernel=attention.kernel,
        )
        out, decision = cp_sparse_attention(inputs.q, inputs.k, inputs.v, None, None, call)
        self._record(decision, context, record)
        return out
