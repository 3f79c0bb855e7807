"""Attend to all earlier tokens of a document."""

from torch import Tensor

from msa_train.model.attention.base import GroupedQueryAttention
from msa_train.model.attention.index_branch import PendingIndexKeys
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.parallel.attention.cp_full import cp_full_attention


class FullSelfAttention(GroupedQueryAttention):
    """Run full causal attention within documents."""

    def attend(
        self,
        started: PendingIndexKeys | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: PackContext,
        record: SelectionRecord,
    ) -> Tensor:
        """See GroupedQueryAttention.attend."""
        return cp_full_attention(q, k, v, self.full_attention_args(context))
