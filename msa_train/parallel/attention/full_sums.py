"""Collect what calls of full attention leave: outputs merged, gradients added, in fp32 where there are two.

The result of the only call over all rows is taken as it is, so that one process computes what its kernel
computes. With a second call sums go on in fp32 (fp64 for fp64) and are rounded once, at the end: error does
not grow with the ranks. That takes 4 bytes for each element of the rank's outputs, and of dq in the backward
pass: 512 MiB each for 16,384 tokens of 64 heads with 128 channels.

Shapes: U queries computed here, M KV heads, G query heads per KV head, D head dim; R rows of any tensor.
"""

import torch
from torch import Tensor

from msa_train.parallel.attention.full_spans import Rows


class MergedOutput:
    """Merge outputs over disjoint sets of keys."""

    def __init__(self, q: Tensor) -> None:
        """Start with nothing seen. q: [U, M, G, D], for shape and dtype."""
        self.like, self.out, self.calls = q, q, 0
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        # -inf: nothing seen yet, and what padding rows keep
        self.lse = torch.full(
            (q.shape[1], q.shape[2], q.shape[0]), float("-inf"), dtype=lse_dtype, device=q.device
        )

    def add(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Take in one call's out [R, M, G, D] and lse [M, G, R]; both may be overwritten."""
        self.calls += 1
        if self.calls == 1:
            if rows.is_all(self.like.shape[0]):
                self.out, self.lse = out, lse
                return
            self.out = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
            rows.put(self.out, out)
            rows.put(self.lse, lse, dim=2)
            return
        # rounding to 16 bits at every merge would add up over ranks
        self.out = self.out.to(self.lse.dtype)
        before = rows.take(self.lse, dim=2)
        # every query of a call sees a key, so the sum is finite
        total = torch.logaddexp(before, lse)
        weights = [(x - total).exp().permute(2, 0, 1).unsqueeze(-1) for x in (before, lse)]
        rows.put(self.lse, total, dim=2)
        # a view of the whole, or a copy of its rows: no other fp32 tensor of this size is made
        merged = rows.take(self.out)
        merged.mul_(weights[0]).addcmul_(out, weights[1])
        if not rows.is_slice:
            rows.put(self.out, merged)

    def finish(self) -> Tensor:
        """Return the output [U, M, G, D] in the dtype of the queries; rows that saw nothing are 0."""
        if self.calls == 0:
            return torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        return self.out.to(self.like.dtype)


class GradSum:
    """Add gradients of rows."""

    def __init__(self, like: Tensor) -> None:
        """Start with zeros. like: [R, ...], for shape and dtype."""
        self.like, self.calls = like, 0
        self.total: Tensor | None = None

    def add(self, rows: Rows, part: Tensor) -> None:
        """Take in one call's gradient of these rows; it may be overwritten."""
        self.calls += 1
        if self.total is None:
            if rows.is_all(self.like.shape[0]):
                self.total = part
                return
            self.total = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        elif self.calls == 2:
            self.total = self.total.to(torch.promote_types(self.like.dtype, torch.float32))
        rows.add(self.total, part)

    def finish(self) -> Tensor:
        """Return the sum [R, ...], in the dtype of `like` or, where several were added, in fp32 or wider."""
        return torch.zeros_like(self.like) if self.total is None else self.total
