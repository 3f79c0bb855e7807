"""Full causal attention over documents."""

from torch import Tensor

from msa_train.model.attention.base import GroupedQueryAttention
from msa_train.model.attention.index_branch import PendingIndexKeys
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.parallel.attention.cp_full import cp_full_attention


class FullSelfAttention(GroupedQueryAttention):
    """Dense causal attention within documents."""

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
