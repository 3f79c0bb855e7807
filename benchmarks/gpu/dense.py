"""Run causal dense attention by the fastest that this machine has: what the kernels are compared with."""

import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.rows import Dense

# One tensor of it has fewer than 2^31 values: libraries count them in 32 bits.
MOST_VALUES = 2**30
# Up to this length every backend is timed; above it the fastest so far, and the next where that one fails.
ALL_BACKENDS_UP_TO = 2**17
# Of the matrix product's rate, what dense attention is assumed to reach when its time is foretold.
ASSUMED_SHARE = 0.5
_TRAINING = 3.5
# A long call is made twice where there is time for this many.
_CALLS_WITH_WARM_UP = 6

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _by_torch(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return attend


def _by_package(name: str) -> Attend:
    """Run attention of an installed package, whose tensors are [1, S, heads, D]."""
    attention = importlib.import_module(name).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        found = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


# What may be there, in the order in which it is tried. Packages: FlashAttention 3 and 2.
CANDIDATES: dict[str, Callable[[], Attend]] = {
    "cudnn": lambda: _by_torch(SDPBackend.CUDNN_ATTENTION),
    "flash_attn_3": lambda: _by_package("flash_attn_interface"),
    "flash": lambda: _by_torch(SDPBackend.FLASH_ATTENTION),
    "flash_attn_2": lambda: _by_package("flash_attn"),
}
ON_CPU = ("flash",)


class DenseAttention:
    """Attend with query heads to K/V heads; [1, heads, S, D] tensors."""

    def __init__(self, context: Context, num_heads: int, num_kv_heads: int, once_s: float = 0.0) -> None:
        """Take the call; once_s: about the seconds of a call."""
        self.context, self.num_heads, self.num_kv_heads = context, num_heads, num_kv_heads
        self.once_s = once_s

    def prefill(self, seq_len: int) -> tuple[float, str]:
        """Return seconds of the forward, and who had the least."""
        q, k, v = self._inputs(seq_len, seq_len)

        def step(attend: Attend) -> None:
            with torch.no_grad():
                attend(q, k, v, True)

        return self._fastest("prefill", seq_len, step)

    def training(self, seq_len: int) -> tuple[float, str]:
        """Return seconds of forward and backward."""
        q, k, v = (tensor.requires_grad_() for tensor in self._inputs(seq_len, seq_len))
        dout = self.context.tensors.normal(*q.shape)

        def step(attend: Attend) -> None:
            torch.autograd.grad(attend(q, k, v, True), (q, k, v), dout)

        return self._fastest("training step", seq_len, step)

    def decode(self, seq_len: int) -> tuple[float, str]:
        """Return seconds of one new token."""
        q, k, v = self._inputs(1, seq_len)
        return self._fastest("decode", seq_len, lambda attend: attend(q, k, v, False))

    def _inputs(self, num_queries: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        normal, D = self.context.tensors.normal, self.context.sizes.head_dim
        k, v = (normal(1, self.num_kv_heads, seq_len, D) for _ in range(2))
        return normal(1, self.num_heads, num_queries, D), k, v

    def _fastest(self, what: str, seq_len: int, step: Callable[[Attend], object]) -> tuple[float, str]:
        """Time all candidates, or above ALL_BACKENDS_UP_TO the best so far and others where it fails."""
        context, found = self.context, {}
        # one token's attention is short at every length
        every = seq_len <= ALL_BACKENDS_UP_TO or what == "decode"
        # a library's first call at a shape looks for its way to compute it
        warm = every or context.clock.left_s > _CALLS_WITH_WARM_UP * self.once_s
        for name in self._order(what):
            with self._noting(name, what, seq_len):
                attend = CANDIDATES[name]()

                def call(attend: Attend = attend) -> object:
                    return step(attend)

                if what == "decode":
                    found[name], _ = context.short_seconds(f"dense decode by {name}", call)
                else:
                    found[name] = context.clock.seconds(call, warm=warm)
            if found and not every:
                break
        if not found:
            raise RuntimeError("dense attention: none of the backends runs, see the notes")
        best = min(found, key=lambda name: found[name])
        return found[best], best

    def _order(self, what: str) -> list[str]:
        """Order backends, the fastest of the longest shorter sequence first, then the others."""
        names = list(ON_CPU if self.context.device.type == "cpu" else CANDIDATES)
        shorter = [dense for dense in self.context.found("dense") if dense["what"] == what]
        best = max(shorter, key=lambda dense: dense["seq_len"])["by"] if shorter else ""
        return sorted(names, key=lambda name: name != best)

    @contextlib.contextmanager
    def _noting(self, name: str, what: str, seq_len: int) -> Iterator[None]:
        """Note a backend that is not there or refuses, and go on to the next."""
        try:
            yield
        except ImportError:
            pass
        except Exception as error:
            # every library has its own errors for what it does not take
            text = str(error).partition("\n")[0]
            self.context.note(f"dense {what} at {seq_len} by {name}: {type(error).__name__}: {text}")
            if not self.context.device_works():
                raise
            self.context.clock.forget_memory()


class DensePart:
    """Time prefill and training step at one length."""

    def __init__(self, context: Context, seq_len: int) -> None:
        self.context, self.seq_len = context, seq_len

    def steps(self) -> dict[str, Step]:
        """Return both measurements."""
        return {
            "prefill": Step(lambda: self._measure("prefill", 1.0), need_s=lambda: self._need_s(1.0)),
            "training step": Step(
                lambda: self._measure("training step", _TRAINING), need_s=lambda: self._need_s(_TRAINING)
            ),
        }

    @property
    def _heads(self) -> int:
        """Count the query heads that are timed together; the time of all is a multiple."""
        sizes = self.context.sizes
        return min(sizes.num_heads, max(1, MOST_VALUES // (self.seq_len * sizes.head_dim)))

    def _once_s(self, factor: float) -> float:
        """Estimate the seconds of one call."""
        context, share = self.context, self._heads / self.context.sizes.num_heads
        once = share * factor * context.sizes.dense_flops(self.seq_len)
        return once / (ASSUMED_SHARE * context.rates.matmul_flops)

    def _need_s(self, factor: float) -> float:
        """Estimate the seconds of one backend's call, or of two backends with a warm-up each."""
        return self._once_s(factor) * (4 if self.seq_len <= ALL_BACKENDS_UP_TO else 1)

    def _measure(self, what: str, factor: float) -> None:
        sizes, heads = self.context.sizes, self._heads
        kv_heads = max(1, heads // sizes.heads_per_group)
        attention = DenseAttention(self.context, heads, kv_heads, self._once_s(factor))
        call = attention.prefill if what == "prefill" else attention.training
        seconds, by = call(self.seq_len)
        flops = factor * sizes.dense_flops(self.seq_len)
        self.context.add_dense(Dense(what, self.seq_len, seconds * sizes.num_heads / heads, by, flops))
        if heads < sizes.num_heads and what == "prefill":
            self.context.note(
                f"dense at {self.seq_len}: {heads} of {sizes.num_heads} heads timed and multiplied"
            )
