"""Time one new token against a cache: selection and attention, and dense attention to the same cache."""

from collections.abc import Callable

import torch
from msa_kernels import decode_attention, quantize_index_keys
from msa_kernels.decode.cache import DecodeCache

from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.dense import DenseAttention
from benchmarks.gpu.rows import Dense, Row

# MiniMax-M2's heads, whose cache is twice M3's
M2_HEADS, M2_KV_HEADS = 48, 8
DECODE, DECODE_FP8, DECODE_M2 = "decode", "decode, fp8 index keys", "decode against 48/8 heads"
_FP8_SCALE_BYTES = 4


def decode_step(context: Context, seq_len: int, *, fp8: bool = False) -> Callable[[], object]:
    """Return a call that decodes one token of one sequence against a full flat cache."""
    sizes, normal, kernel = context.sizes, context.tensors.normal, context.kernel
    M, D, Di = sizes.num_kv_heads, sizes.head_dim, sizes.index_head_dim
    k, v, k_index = normal(1, seq_len, M, D), normal(1, seq_len, M, D), normal(1, seq_len, Di)
    cache = DecodeCache(k=k, v=v, k_index=k_index)
    if fp8:
        keys, scale = quantize_index_keys(k_index)
        cache = DecodeCache(k=k, v=v, k_index=keys, k_index_scale=scale)
    q, q_index = normal(1, sizes.num_heads, D), normal(1, M, Di)
    lens = torch.tensor([seq_len], dtype=torch.int32, device=context.device)
    shape = {"block_size": sizes.block_size, "topk": sizes.topk}
    return lambda: decode_attention(q, q_index, cache, lens, **shape, kernel=kernel)


class DecodePart:
    """Time one token, ours with index keys in 16 and 8 bits, and dense with M3's and M2's heads."""

    def __init__(self, context: Context, seq_len: int) -> None:
        self.context, self.seq_len = context, seq_len

    def steps(self) -> dict[str, Step]:
        """Return ours first."""
        steps = {
            DECODE: Step(lambda: self._ours(DECODE, fp8=False), ("decode",)),
            DECODE_FP8: Step(lambda: self._ours(DECODE_FP8, fp8=True), ("decode, fp8 index keys",)),
            "dense": Step(lambda: self._dense((DECODE, DECODE_FP8), *self._heads)),
        }
        if not self.context.smoke:
            steps["dense, 48/8 heads"] = Step(lambda: self._dense((DECODE_M2,), M2_HEADS, M2_KV_HEADS))
        return steps

    @property
    def _heads(self) -> tuple[int, int]:
        return self.context.sizes.num_heads, self.context.sizes.num_kv_heads

    def _ours(self, what: str, *, fp8: bool) -> None:
        context = self.context
        seconds, eager_s = context.short_seconds(what, decode_step(context, self.seq_len, fp8=fp8))
        token_bytes = context.sizes.index_head_dim + _FP8_SCALE_BYTES if fp8 else None
        num_bytes = context.sizes.decode_bytes(self.seq_len, context.tensors.element_bytes, token_bytes)
        row = Row(what, self.seq_len, seconds, num_bytes=num_bytes, eager_s=eager_s)
        row.peak_gib = context.clock.peak_gib()
        context.add(row)
        if what == DECODE and not context.smoke:
            context.add(Row(DECODE_M2, self.seq_len, seconds, num_bytes=num_bytes, eager_s=eager_s))

    def _dense(self, rows: tuple[str, ...], num_heads: int, num_kv_heads: int) -> None:
        context = self.context
        seconds, by = DenseAttention(context, num_heads, num_kv_heads).decode(self.seq_len)
        element_bytes = context.tensors.element_bytes
        num_bytes = 2.0 * self.seq_len * num_kv_heads * context.sizes.head_dim * element_bytes
        for what in rows:
            context.add_dense(Dense(what, self.seq_len, seconds, by, num_bytes=num_bytes))
