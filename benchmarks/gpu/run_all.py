"""Checks the kernels on this GPU, then times them against dense attention: one command, under nine minutes.

    python benchmarks/gpu/run_all.py --out DIR                        # a Hopper GPU; needs torch and triton
    python benchmarks/gpu/run_all.py --out DIR --device cpu --smoke   # tiny, in Triton's interpreter

Writes DIR/gpu.json and DIR/gpu.md. Exit code 0; 1 if a kernel is wrong; 2 for bad arguments.
"""

# ruff: noqa: E402
import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from msa_kernels.dispatch import has_triton

from benchmarks.gpu.check import run_checks
from benchmarks.gpu.clock import Clock, copy_bytes, matmul_flops
from benchmarks.gpu.dense import DenseAttention
from benchmarks.gpu.problem import M3, SMOKE, LayerSizes, Tensors
from benchmarks.gpu.report import Rates, Result, Row, markdown
from benchmarks.gpu.sparse import SparseTimes, decode_time, groups_at_once, sparse_times, topk_times
from benchmarks.machine import machine

SEQ_LENS = (2**15, 2**17, 2**19, 2**20)
TOPK_SEQ_LEN = 2**17
# MiniMax-M2's heads, whose cache is twice M3's
M2_HEADS, M2_KV_HEADS = 48, 8
# Of the matrix product's rate, what dense attention is assumed to reach when its time is foretold.
DENSE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Scale:
    """What differs between a GPU and a smoke test."""

    sizes: LayerSizes
    dtype: torch.dtype
    matmul_size: int
    copy_bytes: int
    check_seq_len: int
    check_queries: int
    topk_seq_len: int


GPU = Scale(M3, torch.bfloat16, 8192, 2**31, 8192, 512, TOPK_SEQ_LEN)
# the interpreter computes garbage in bf16
TINY = Scale(SMOKE, torch.float32, 256, 2**20, 128, 16, 64)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--kernel", choices=["triton", "cpu"], default="triton", help="what is measured")
    parser.add_argument("--seq-lens", nargs="+", type=int, help="tokens; default: 32K, 128K, 512K, 1M")
    parser.add_argument("--budget-s", type=float, default=520.0, help="seconds after which nothing is begun")
    parser.add_argument("--seed", type=int, help="of all inputs; default: another one every time")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: no GPU can be used here; use --device cpu --smoke")
    if arguments.device == "cpu" and not arguments.smoke:
        raise ValueError("--device=cpu: the sizes are a GPU's; add --smoke")
    if arguments.kernel == "triton" and not has_triton():
        raise ValueError("--kernel=triton: triton is not installed; pip install 'triton>=3.6,<3.10'")
    if not arguments.budget_s > 0:
        raise ValueError(f"--budget-s={arguments.budget_s}: must be above 0")
    block_size = (SMOKE if arguments.smoke else M3).block_size
    arguments.seq_lens = arguments.seq_lens or ([4 * block_size] if arguments.smoke else list(SEQ_LENS))
    for seq_len in arguments.seq_lens:
        if seq_len < block_size or seq_len % block_size:
            raise ValueError(f"--seq-lens={seq_len}: must be a multiple of {block_size}, the block size")
    if arguments.seed is None:
        arguments.seed = time.time_ns() % 2**31
    return arguments


class Run:
    """One run: each measurement is tried, and what cannot be made is noted and left out."""

    def __init__(self, arguments: argparse.Namespace, result: Result) -> None:
        self.arguments, self.result = arguments, result
        self.scale = TINY if arguments.smoke else GPU
        self.device = torch.device(arguments.device)
        self.clock = Clock(self.device, arguments.budget_s)
        self.tensors = Tensors(self.device, self.scale.dtype, arguments.seed)
        self.shorter: tuple[int, SparseTimes] | None = None

    def measure(self) -> None:
        """All of it, short sequences first."""
        scale, clock = self.scale, self.clock
        self.result.rates = Rates(
            matmul_flops(clock, scale.dtype, scale.matmul_size), copy_bytes(clock, scale.copy_bytes)
        )
        self.result.checks = run_checks(
            self.tensors, scale.sizes, self.arguments.kernel,
            seq_len=scale.check_seq_len, num_queries=scale.check_queries,
        )  # fmt: skip
        for seq_len in sorted(self.arguments.seq_lens):
            what = f"sparse attention at {seq_len}"
            self._try(what, self._sparse_need(seq_len), lambda n=seq_len: self._attention(n))
            self._try(f"decode at {seq_len}", 0.0, lambda n=seq_len: self._decode(n))
        self._try("selection against torch.topk", 0.0, self._topk)

    def _try(self, what: str, need_s: float, call: Callable[[], Any]) -> Any:
        """What call returns; None, and a note, where it fails or the time does not suffice."""
        notes, left = self.result.notes, self.clock.left_s
        if need_s > left or left <= 0:
            notes.append(f"{what}: left out, {left:.0f} s are left and it would take about {need_s:.0f}")
            return None
        self.clock.forget_memory()
        try:
            return call()
        except Exception as error:
            # out of memory, or whatever a driver says: the rest goes on
            notes.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
            return None

    def _add(self, row: Row) -> None:
        assert self.result.rates is not None, "measured first"
        self.result.rows.append(row.finish(self.result.rates))
        print(f"{row.what}, {row.seq_len} tokens: {row.ours_s * 1e3:.4g} ms", flush=True)

    def _attention(self, seq_len: int) -> None:
        sizes, kernel = self.scale.sizes, self.arguments.kernel
        times = sparse_times(self.clock, self.tensors, sizes, seq_len, kernel)
        self.shorter, peak_gib = (seq_len, times), self.clock.peak_gib()
        if times.groups_at_once < sizes.num_kv_heads:
            self.result.notes.append(
                f"{seq_len} tokens: {times.groups_at_once} of {sizes.num_kv_heads} KV groups timed, ours and "
                "dense, and multiplied; their queries and gradients do not fit the memory together"
            )
        self._parts(times, seq_len)
        prefill = times.select + times.forward
        training = times.select + times.training_forward + times.backward
        scoring, pairs = sizes.scoring_flops(seq_len), times.num_pairs
        sparse = pairs * sizes.pair_flops()
        flops = {"prefill": scoring + sparse}
        flops["training step"] = scoring + 3.5 * sparse + pairs * sizes.kl_pair_flops()
        for what, ours_s in (("prefill", prefill), ("training step", training)):
            row = Row(what, seq_len, ours_s, flops=flops[what], peak_gib=peak_gib)
            need_s = self._dense_need(what, seq_len)
            found = self._try(f"dense {what} at {seq_len}", need_s, lambda w=what: self._dense(w, seq_len))
            if found is not None:
                row.dense_s, row.dense_by = found
            self._add(row)

    def _parts(self, times: SparseTimes, seq_len: int) -> None:
        """The operators by themselves."""
        sizes, pairs = self.scale.sizes, times.num_pairs
        sparse = pairs * sizes.pair_flops()
        backward = 2.5 * sparse + pairs * sizes.kl_pair_flops()
        self._add(Row("scoring", seq_len, times.select, flops=sizes.scoring_flops(seq_len)))
        self._add(Row("sparse forward", seq_len, times.forward, flops=sparse))
        self._add(Row("sparse backward + KL", seq_len, times.backward, flops=backward))

    def _sparse_need(self, seq_len: int) -> float:
        """Seconds of three calls of everything, by a shorter sequence's; scoring grows as a square."""
        if self.shorter is None:
            return 0.0
        length, times = self.shorter
        ratio = seq_len / length
        return 3 * ratio * (ratio * times.select + times.forward + times.training_forward + times.backward)

    def _dense_need(self, what: str, seq_len: int) -> float:
        """Seconds of one backend's calls, or of two with a warm-up each where there is a choice."""
        assert self.result.rates is not None, "measured first"
        once = self.scale.sizes.dense_flops(seq_len) / (DENSE_SHARE * self.result.rates.matmul_flops)
        once *= groups_at_once(self.scale.sizes, seq_len) / self.scale.sizes.num_kv_heads
        calls = 4 if seq_len <= TOPK_SEQ_LEN else 1
        return calls * once * (3.5 if what == "training step" else 1.0)

    def _dense(self, what: str, seq_len: int) -> tuple[float, str]:
        """Seconds over all heads, and the backend."""
        sizes = self.scale.sizes
        at_once = groups_at_once(sizes, seq_len)
        attention = DenseAttention(self.tensors, at_once * sizes.heads_per_group, at_once, sizes.head_dim)
        shorter = [row for row in self.result.rows if row.what == what and row.dense_by]
        if seq_len > TOPK_SEQ_LEN and shorter:
            attention.keep(shorter[-1].dense_by)
        seconds, backend = (attention.prefill if what == "prefill" else attention.training)(
            self.clock, seq_len
        )
        self._note_backends(attention)
        return seconds * sizes.num_kv_heads / at_once, backend

    def _decode(self, seq_len: int) -> None:
        sizes, tensors = self.scale.sizes, self.tensors
        ours_s = decode_time(self.clock, tensors, sizes, seq_len, self.arguments.kernel)
        floor_bytes = sizes.decode_bytes(seq_len, torch.empty(0, dtype=self.scale.dtype).element_size())
        heads = {"decode": (sizes.num_heads, sizes.num_kv_heads)}
        if not self.arguments.smoke:
            heads[f"decode against {M2_HEADS}/{M2_KV_HEADS} heads"] = (M2_HEADS, M2_KV_HEADS)
        for what, (num_heads, num_kv_heads) in heads.items():
            attention = DenseAttention(tensors, num_heads, num_kv_heads, sizes.head_dim)
            dense_s, backend = attention.decode(self.clock, seq_len)
            self._note_backends(attention)
            self._add(Row(what, seq_len, ours_s, dense_s, backend, floor_bytes=floor_bytes))

    def _topk(self) -> None:
        seq_len, sizes = self.scale.topk_seq_len, self.scale.sizes
        ours_s, theirs_s = topk_times(self.clock, self.tensors, sizes, seq_len, self.arguments.kernel)
        self._add(Row("selection against torch.topk", seq_len, ours_s, theirs_s, "torch.topk"))

    def _note_backends(self, attention: DenseAttention) -> None:
        for name, error in attention.errors.items():
            note = f"torch's {name}: {error}"
            if note not in self.result.notes:
                self.result.notes.append(note)


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ran where."""
    found = machine() | {"torch": str(torch.__version__), "seed": arguments.seed, "smoke": arguments.smoke}
    found["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    if has_triton():
        import triton

        found["triton"] = triton.__version__
    if arguments.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found | {"platform": platform.platform()}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    try:
        arguments = parse(argv)
    except ValueError as error:
        print(f"run_all.py: error: {error}", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and arguments.kernel == "triton":
        # before the first kernel is imported
        os.environ["TRITON_INTERPRET"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if argv is None else argv
    result = Result(f"python benchmarks/gpu/run_all.py {' '.join(words)}", facts(arguments))
    run = Run(arguments, result)
    try:
        run.measure()
    finally:
        # what there is, even if the run is stopped
        result.facts["seconds"] = round(arguments.budget_s - run.clock.left_s, 1)
        (arguments.out / "gpu.json").write_text(
            json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8"
        )
        (arguments.out / "gpu.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0 if result.correct else 1


if __name__ == "__main__":
    sys.exit(main())
