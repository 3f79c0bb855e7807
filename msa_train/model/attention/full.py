"""Attend to all earlier tokens of a document."""

from torch import Tensor

from msa_train.model.attention.base import AttentionInputs, GroupedQueryAttention
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.parallel.attention.cp_full import cp_full_attention


class FullSelfAttention(GroupedQueryAttention):
    """Run full causal attention within documents."""

    def attend(self, inputs: AttentionInputs, context: PackContext, record: SelectionRecord) -> Tensor:
        """See GroupedQueryAttention.attend."""
        return cp_full_attention(inputs.q, inputs.k, inputs.v, self.full_attention_args(context))
