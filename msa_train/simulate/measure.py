"""Measure kernel rates of this machine's device, with this project's own kernels: what `--rates` wants.

On a CPU one thread works and its processor time counts, so that other processes disturb little; on a GPU
its own clock counts. The fastest of several rounds is taken.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.op import pack_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, SparseQueries
from msa_kernels.full_attention.op import attention_backward, attention_forward
from torch import Tensor

from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR, LayerShape
from msa_train.simulate.inputs.rates import RATE_NAMES

ROUNDS = 3


@dataclass(slots=True)
class MeasuredRates:
    """Hold what was measured."""

    rates: dict[str, float]
    "FLOP/s, bytes per second or seconds, by name of RATE_NAMES"
    device: str
    "name of the device"
    setting: str
    "sizes and dtype in words"


def measure_rates(
    shape: LayerShape, *, num_tokens: int, seq_len: int, precision: str | None = None, rounds: int = ROUNDS
) -> MeasuredRates:
    """Time every kernel of a layer; full attention and index scoring take time with num_tokens * seq_len.

    Args:
        shape: heads and sizes.
        num_tokens: queries of a rank, the last ones of the sequence.
        seq_len: keys.
        precision: fp32 or bf16; None: bf16 on a GPU, else fp32.
        rounds: of which the fastest counts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    # processor time of several threads would depend on how they wait for one another
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = _Bench(
            shape, num_tokens, seq_len, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        )
        rates = bench.run(rounds)
    finally:
        torch.set_num_threads(threads)
    setting = f"{num_tokens} queries, {seq_len} keys, {precision}"
    if device.type == "cpu":
        setting += ", one thread, processor time"
    return MeasuredRates(rates, _device_name(device), setting)


def write_rates(path: Path, measured: MeasuredRates, command: str) -> None:
    """Write a file that `load_rates` reads; command: the one that measured, named as the source."""
    source = f"measured: {measured.setting}; {command}"
    content: dict[str, Any] = {
        "name": path.stem,
        "kind": "measured",
        "device": measured.device,
        "torch": str(torch.__version__),
        "rates": {
            name: {"value": float(f"{measured.rates[name]:.4g}"), "source": source} for name in RATE_NAMES
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")


class _Bench:
    """Hold the tensors of one layer, T queries against S keys, and time kernels on them."""

    def __init__(
        self, shape: LayerShape, num_tokens: int, seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.T, self.S = shape, num_tokens, seq_len
        self.device, self.dtype = device, dtype
        generator = torch.Generator().manual_seed(0)
        M, G, D = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        self.x, self.weight = (
            random(self.T, shape.hidden_size),
            random(shape.hidden_size, (M * G + 2 * M) * D),
        )
        self.q, self.k, self.v = random(self.T, M, G, D), random(self.S, M, D), random(self.S, M, D)
        self.q_index = random(self.T, M, shape.index_head_dim)
        self.k_index = random(self.S, shape.index_head_dim)
        self.dout = random(self.T, M, G, D)
        self.position = torch.arange(self.S - self.T, self.S, device=device)
        self.cu_seqlens = torch.tensor([0, self.S])
        block = torch.arange(self.S // shape.block_size, device=device).repeat(M)
        self.pool = BlockPool(kv=pack_blocks(self.k, self.v, shape.block_size), block=block)

    def run(self, rounds: int) -> dict[str, float]:
        """Return the rates by name: work as LayerShape counts it, over the seconds of the fastest round."""
        shape, T = self.shape, self.T
        # the queries are the last T of S: each sees S - T keys before them, and 1 to T of its own
        causal = T * (self.S - T) + T * (T + 1) / 2
        tiles = T * min(shape.topk, self.S // shape.block_size)
        qkv = self._seconds(lambda: self.x @ self.weight, rounds)
        index = self._seconds(self._select, rounds)
        forward, backward, kl = self._sparse(rounds)
        full_forward, full_backward = self._full(rounds)
        # rows are packed in the order of requests, which is no order in memory
        pairs = torch.randperm(self.pool.kv.shape[0], device=self.device)
        copied = self._seconds(lambda: self.pool.kv.index_select(0, pairs), rounds)
        sparse = shape.sparse_flops(tiles)
        dense = shape.full_flops(T * self.S)
        return {
            "projection_flops": shape.qkv_flops(T) / qkv,
            "index_flops": shape.index_flops(causal) / index,
            "sparse_forward_flops": sparse / forward,
            "sparse_backward_flops": BACKWARD_FACTOR * sparse / backward,
            "kl_flops": shape.kl_flops(tiles) / kl,
            "full_forward_flops": dense / full_forward,
            "full_backward_flops": BACKWARD_FACTOR * dense / full_backward,
            "copy_bytes": self.pool.kv.numel() * self.pool.kv.element_size() / copied,
            "layer_overhead_s": self._overhead(rounds),
        }

    def _select(self) -> Tensor:
        return select_blocks(
            self.q_index, self.k_index, self.cu_seqlens, block_size=self.shape.block_size,
            topk=self.shape.topk,
            local_blocks=self.shape.local_blocks, query_offset=self.S - self.T,
        )  # fmt: skip

    def _queries(self, *, with_kl: bool) -> SparseQueries:
        k_index = self.k_index.view(-1, self.shape.block_size, self.k_index.shape[-1])
        return SparseQueries(
            q=self.q, position=self.position, softmax_scale=self.q.shape[-1] ** -0.5,
            q_index=self.q_index if with_kl else None, k_index=k_index if with_kl else None,
            index_scale=self.q_index.shape[-1] ** -0.5,
        )  # fmt: skip

    def _sparse(self, rounds: int) -> tuple[float, float, float]:
        """Return the seconds of forward (with the KL normaliser), backward without KL loss, and the KL loss.

        The KL loss has no kernel of its own: its time is the difference of backward passes with and without.
        """
        num_blocks = self.S // self.shape.block_size
        group = torch.arange(self.shape.num_kv_heads, device=self.device)[:, None]
        # block ids per KV head become rows of the pool, which holds the blocks of all heads one after another
        ids = self._select().long()
        block_table = torch.where(ids >= 0, ids + group * num_blocks, -1)
        queries = self._queries(with_kl=True)
        part = pool_forward(queries, self.pool, block_table)
        assert part.lse_index is not None, "index queries were given"
        term = KlTerm(lse_index=part.lse_index, weight=1.0)
        dout = self.dout
        # row sums of dO * O, as in FlashAttention-2's backward pass (arXiv 2307.08691)
        delta = output_delta(dout, part.out.to(dout.dtype))

        def backward(kl: KlTerm | None) -> object:
            asked = self._queries(with_kl=kl is not None)
            return pool_backward(asked, self.pool, block_table, dout, delta, part.lse, kl)

        forward_s = self._seconds(lambda: pool_forward(queries, self.pool, block_table), rounds)
        backward_s = self._seconds(lambda: backward(None), rounds)
        both_s = self._seconds(lambda: backward(term), rounds)
        return forward_s, backward_s, max(both_s - backward_s, 1e-3 * backward_s)

    def _full(self, rounds: int) -> tuple[float, float]:
        """Return the seconds of forward and backward attention over all T * S pairs, none masked."""
        q, k, v, dout = self.q, self.k, self.v, self.dout
        limits, scale = ([0, self.T], [0, self.S]), self.q.shape[-1] ** -0.5
        out, lse = attention_forward(q, k, v, *limits, causal=False, softmax_scale=scale)

        def forward() -> object:
            return attention_forward(q, k, v, *limits, causal=False, softmax_scale=scale)

        def backward() -> object:
            return attention_backward(dout, q, k, v, out, lse, *limits, causal=False, softmax_scale=scale)

        return self._seconds(forward, rounds), self._seconds(backward, rounds)

    def _overhead(self, rounds: int) -> float:
        """Return the seconds of a layer's forward kernels on one query, which computes next to nothing."""
        size = self.shape.block_size
        small = _Bench(self.shape, size, size, self.device, self.dtype)
        small.x, small.weight = small.x[:1, :1], small.weight[:1, :1]
        block_table = torch.arange(self.shape.num_kv_heads, device=self.device)[None, :, None]
        queries = SparseQueries(small.q[:1], small.position[:1], 1.0)

        def forward() -> None:
            _ = small.x @ small.weight
            select_blocks(
                small.q_index[:1], small.k_index, small.cu_seqlens, block_size=size, topk=self.shape.topk,
                local_blocks=self.shape.local_blocks,
            )  # fmt: skip
            pool_forward(queries, small.pool, block_table)

        return self._seconds(forward, rounds)

    def _seconds(self, call: Callable[[], object], rounds: int) -> float:
        """Return the seconds of the fastest of some rounds, after one that does not count."""
        call()
        return min(self._once(call) for _ in range(rounds))

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3
        # processor time, not wall-clock time: other processes of the machine do not count
        start = time.process_time()
        call()
        return max(time.process_time() - start, 1e-9)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
