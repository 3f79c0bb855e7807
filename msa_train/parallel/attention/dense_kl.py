"""Compute the KL loss of the index branch over all causal tokens of a sequence that is split over ranks.

Used in the dense warm-up stage by the backward pass of `cp_full_attention`, which brings the keys piece by
piece. For a query and a KV head, with the mean p of its heads' attention as the teacher and the student
s = softmax of the index scores z:

    loss = weight * sum_j p_j log(p_j / s_j)        dloss / dz_j = weight * (s_j - p_j)

Teacher and student are over the same tokens. The teacher is a constant: q and k get no gradient from it.

The gradient of all index keys is held whole, [S, Di] fp32: 512 MiB at 1M tokens (Di = 128), whatever the
number of ranks. Its reduce-scatter brings a rank (P - 1) / P of that.

Shapes: T local tokens, U queries computed here, S tokens of the pack, P ranks, M KV heads, G query heads per
KV head, D head dim, Di index head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from msa_train.config import AttentionKernel
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.sharding.shard_layout import Segment, ShardLayout, visible_parts


@dataclass(slots=True)
class IndexKl:
    """Hold what the loss needs beside queries and keys."""

    all_keys: Tensor
    "[S, Di] index keys of the whole pack, detached"
    weight: float
    "factor of the divergence summed over queries and KV heads; holds the division by their number"
    index_scale: float
    "factor of the index scores"
    temperature: float
    "divides the logits of teacher and student"
    on_kl: Callable[[Tensor], None] | None
    "receives this rank's unweighted sum of divergences (fp64, nats) in the backward pass; None: form none"
    kernel: AttentionKernel = AttentionKernel.auto
    "implementation, see `msa_kernels.dense_kl`"


class TeacherLse:
    """Collect the log-sum-exp of the main branch's scores at the teacher's temperature, in the forward pass.

    Its `lse` [M, G, U] is the attention's own, without further work, where the temperature is 1 or there is
    no loss.
    """

    def __init__(self, settings: IndexKl | None, q_heads: Tensor, lse: Tensor, softmax_scale: float) -> None:
        self.q_heads, self.lse = q_heads, lse
        self.own = settings is not None and settings.temperature != 1.0
        # At another temperature the teacher is another softmax, which the attention's normaliser does not
        # fit.
        if settings is not None and self.own:
            self.kernel = settings.kernel.value
            self.lse = torch.full_like(lse, float("-inf"))
            self.softmax_scale = softmax_scale / settings.temperature

    def add(self, rows: slice, k_heads: Tensor, *, causal: bool) -> None:
        """Take in keys [M, n, D] that the queries `rows` see."""
        if not self.own:
            return
        part = lse_part(
            self.q_heads[:, :, rows], k_heads,
            causal=causal, softmax_scale=self.softmax_scale, kernel=self.kernel,
        )  # fmt: skip
        self.lse[:, :, rows] = torch.logaddexp(self.lse[:, :, rows], part)


class DenseKl:
    """Collect gradients and value over the pieces of keys that come by."""

    def __init__(
        self,
        settings: IndexKl,
        layout: ShardLayout,
        segments: list[Segment],
        q_heads: Tensor,
        q_index: Tensor,
        lse: Tensor,
        softmax_scale: float,
    ) -> None:
        """Compute the student's normalisers; gradients start at zero.

        Args:
            settings: see IndexKl.
            layout: the tokens of every rank.
            segments: document parts of the U queries.
            q_heads: [M, G, U, D] queries of the main branch.
            q_index: [U, M, Di] index queries.
            lse: [M, G, U] of the teacher, see TeacherLse.
            softmax_scale: factor of the attention scores.
        """
        self.settings, self.layout, self.segments = settings, layout, segments
        self.q_heads, self.index_dtype = q_heads, q_index.dtype
        self.q_index = q_index.transpose(0, 1)
        self.softmax_scale = softmax_scale / settings.temperature
        self.index_scale = settings.index_scale / settings.temperature
        self.lse, self.lse_index = lse, self._index_lse()
        self.dq_index = torch.zeros_like(self.q_index, dtype=self.lse_index.dtype)
        # Of the whole pack: any query may see any earlier key.
        self.dk_index = torch.zeros_like(settings.all_keys, dtype=self.lse_index.dtype)
        self.kl = torch.zeros((), dtype=torch.float64, device=q_index.device)

    def _index_lse(self) -> Tensor:
        """Compute the student's normalisers [M, U]; index keys are all here, so no piece is waited for."""
        shape = self.q_index.shape[:2]
        dtype = torch.float64 if self.q_index.dtype == torch.float64 else torch.float32
        result = torch.full(shape, float("-inf"), dtype=dtype, device=self.q_index.device)
        num_keys = self.settings.all_keys.shape[0]
        for visible in (part for s in self.segments for part in visible_parts(s, 0, num_keys)):
            part = lse_part(
                self.q_index[:, None, visible.rows],
                self.settings.all_keys[None, visible.start : visible.stop],
                causal=visible.causal,
                softmax_scale=self.index_scale,
                kernel=self.settings.kernel.value,
            )
            result[:, visible.rows] = torch.logaddexp(result[:, visible.rows], part.squeeze(1))
        return result

    def add(self, rows: slice, position: int, k_heads: Tensor, *, causal: bool) -> None:
        """Take in keys [M, n, D] at positions [position, position + n), seen by the queries `rows`."""
        keys = slice(position, position + k_heads.shape[1])
        grads = dense_kl_part(
            self.q_heads[:, :, rows], k_heads, self.lse[:, :, rows],
            self.q_index[:, rows], self.settings.all_keys[keys], self.lse_index[:, rows],
            causal=causal, softmax_scale=self.softmax_scale, index_scale=self.index_scale,
            with_value=self.settings.on_kl is not None, kernel=self.settings.kernel.value,
        )  # fmt: skip
        self.dq_index[:, rows] += grads.dq_index
        self.dk_index[keys] += grads.dk_index
        if grads.kl is not None:
            self.kl += grads.kl

    def finish(self, comm: CpComm) -> tuple[Tensor, Tensor]:
        """Report the value; return the weighted gradients of index queries [U, M, Di] and own keys [T, Di].

        Raises:
            ExchangeError: the reduce-scatter failed.
        """
        if self.settings.on_kl is not None:
            self.settings.on_kl(self.kl)
        # Every rank has gradients of all index keys from its own queries: summed over context-parallel ranks,
        # each gets the sum of its own keys.
        shards = self.layout.by_owner(self.dk_index)
        dk_index = comm.reduce_scatter(shards, "index_key_grad") * self.settings.weight
        dq_index = self.dq_index.transpose(0, 1) * self.settings.weight
        return dq_index.to(self.index_dtype), dk_index.to(self.index_dtype)
