"""Hold the arguments of one selection, which the operator builds once and every implementation takes."""

from dataclasses import dataclass, replace

from torch import Tensor

from msa_kernels.fp8 import quantize_index_keys


@dataclass(frozen=True, slots=True)
class SelectionArgs:
    """Describe one call of `select_blocks`, checked there; the defaults are the operator's own."""

    q_index: Tensor
    """[T, M, D] index queries, any float dtype."""
    k_index: Tensor
    """[S, D] index keys of the whole pack."""
    cu_seqlens: Tensor
    """[num_docs + 1] int32 or int64 document starts, multiples of block_size; the last one is S."""
    block_size: int
    """Tokens per key block."""
    topk: int
    """Blocks per query and KV head, the forced ones included."""
    local_blocks: int = 1
    """Forced blocks, which end at the query's own."""
    query_offset: int = 0
    """Position of the first query in the pack, in tokens; not read where `position` is given."""
    query_valid: Tensor | None = None
    """[T] bool, False for padding queries; None: all are valid."""
    position: Tensor | None = None
    """[T] int32 or int64, ascending positions of the queries in the pack; None: consecutive ones."""
    return_lse: bool = False
    """Whether the log-sum-exp of the selected tokens' scores is formed too."""
    index_scale: float | None = None
    """Factor of the scores in the log-sum-exp, above 0; None: D^-0.5."""
    key_scale: Tensor | None = None
    """[S] fp32 factor of each key, where queries and keys are float8_e4m3fn; None: they are not."""

    @property
    def lse_scale(self) -> float | None:
        """Return the factor of the scores in the log-sum-exp; None where none is asked for."""
        if not self.return_lse:
            return None
        return self.q_index.shape[-1] ** -0.5 if self.index_scale is None else self.index_scale

    def in_fp8(self, *, restored: bool) -> "SelectionArgs":
        """Round queries and keys to 8 bits; restored: as fp32 tensors of the rounded values.

        Takes some copies of them in fp32. The factors of the queries are dropped: they change no ranking.
        """
        q, _ = quantize_index_keys(self.q_index)
        k, scale = quantize_index_keys(self.k_index)
        if restored:
            return replace(self, q_index=q.float(), k_index=k.float() * scale[:, None])
        return replace(self, q_index=q, k_index=k, key_scale=scale)
