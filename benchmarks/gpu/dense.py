"""Causal dense attention through the fastest of torch's backends: what the kernels are compared with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.problem import Tensors

BACKENDS = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION,),
}


class DenseAttention:
    """num_heads query heads over num_kv_heads K/V heads; [1, heads, S, D] tensors."""

    def __init__(self, tensors: Tensors, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.tensors, self.num_heads, self.num_kv_heads, self.head_dim = (
            tensors,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.backends = list(BACKENDS[tensors.device.type])
        self.errors: dict[str, str] = {}

    def prefill(self, clock: Clock, seq_len: int) -> tuple[float, str]:
        """Seconds of the forward, and the backend that had the least."""
        q, k, v = (tensor for tensor in self._inputs(seq_len, seq_len))
        return self._fastest(clock, lambda: self._attend(q, k, v, causal=True))

    def training(self, clock: Clock, seq_len: int) -> tuple[float, str]:
        """Seconds of forward and backward."""
        q, k, v = (tensor.requires_grad_() for tensor in self._inputs(seq_len, seq_len))
        dout = self.tensors.normal(*q.shape)

        def step() -> None:
            torch.autograd.grad(self._attend(q, k, v, causal=True), (q, k, v), dout)

        return self._fastest(clock, step)

    def decode(self, clock: Clock, seq_len: int) -> tuple[float, str]:
        """Seconds of one new token."""
        q, k, v = self._inputs(1, seq_len)
        return self._fastest(clock, lambda: self._attend(q, k, v, causal=False))

    def keep(self, backend: str) -> None:
        """Try no other from here on."""
        self.backends = [candidate for candidate in self.backends if candidate.name == backend]

    def _inputs(self, num_queries: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        normal, D = self.tensors.normal, self.head_dim
        k, v = (normal(1, self.num_kv_heads, seq_len, D) for _ in range(2))
        return normal(1, self.num_heads, num_queries, D), k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def _fastest(self, clock: Clock, call: Callable[[], object]) -> tuple[float, str]:
        found: dict[str, float] = {}
        for backend in self.backends:
            try:
                with sdpa_kernel(backend):
                    # a single backend is one that was chosen at a smaller size: it has run before
                    found[backend.name] = clock.seconds(call, warm=len(self.backends) > 1)
            except RuntimeError as error:
                self.errors[backend.name] = str(error).partition("\n")[0]
        if not found:
            raise RuntimeError(f"no backend of torch's attention runs: {self.errors}")
        best = min(found, key=lambda name: found[name])
        return found[best], best
