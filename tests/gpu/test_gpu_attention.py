"""Dense attention on the device: every kernel as `full_attention` calls it, and as benchmarks do."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from msa_kernels.full_attention import tiled
from msa_kernels.full_attention.choice import KERNELS, choose_by_rule, find_machine
from msa_kernels.full_attention.op import attention_backward, attention_forward, merge_parts, takes_offset
from torch import Tensor

from benchmarks.gpu.dense import CANDIDATES
from benchmarks.gpu.problem import M3, Tensors
from tests.helpers.compare import worst_row
from tests.helpers.device_jobs import HAS_GPU, Job, needs_device, needs_gpu

pytestmark = pytest.mark.gpu
M, G, D = 2, M3.heads_per_group, M3.head_dim
# Keys that all queries see, in parts; then queries, which see their own keys causally.
CASES: dict[str, tuple[Sequence[int], int]] = {
    "causal": ((), 300),
    "one query": ((63,), 1),
    "behind other keys": ((257,), 130),
    "three parts": ((64, 1), 128),
}
# Queries and keys: every query sees every key.
WITHOUT_CAUSE = {"fewer queries than keys": (37, 260), "more queries than keys": (260, 37)}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NAMES = ("out", "dq", "dk", "dv")
# Of a log-sum-exp, relative to the largest: in 16 bits torch takes exponentials that are good to 2^-20.
LSE_ROUNDING = 3e-5
# Relative, beside twice the error of plain torch, which in fp32 may be nothing by chance.
ROUNDING = {torch.bfloat16: 0.0, torch.float32: 2.0**-22, torch.float64: 1e-13}


def plain(tensors: Sequence[Tensor], hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What NAMES lists and the log-sum-exp, by the definition and autograd in this dtype."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors[:3])
    scores = (q @ k[:, None].mT * D**-0.5).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ v[:, None]
    grads = torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))
    return out.detach(), *grads, scores.detach().logsumexp(-1)


def by_rows(x: Tensor) -> Tensor:
    """[M, G, Q, D] -> [Q, M, G, D], or [M, K, D] -> [K, M, D], in order in memory as a layer has them."""
    return x.movedim(-2, 0).contiguous()


def by_parts(
    tensors: Sequence[Tensor], parts: Sequence[tuple[slice, bool]], kernel: str = "auto"
) -> tuple[Tensor, ...]:
    """The same as a layer does: each part on its own, merged; gradients of each from what was merged."""
    q, k, v, dout = (by_rows(x) for x in tensors)
    out, lse = None, None
    for keys, causal in parts:
        limits = [0, q.shape[0]], [0, k[keys].shape[0]]
        rows, part_lse = attention_forward(
            q, k[keys], v[keys], *limits, causal=causal, softmax_scale=D**-0.5, kernel=kernel
        )
        part = rows.movedim(0, -2).to(torch.promote_types(q.dtype, torch.float32)), part_lse
        out, lse = part if out is None or lse is None else merge_parts(out, lse, *part)
    assert out is not None
    assert lse is not None
    out = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for keys, causal in parts:
        share = attention_backward(
            dout, q, k[keys], v[keys], by_rows(out), lse, [0, q.shape[0]], [0, k[keys].shape[0]],
            causal=causal, softmax_scale=D**-0.5, kernel=kernel,
        )  # fmt: skip
        for whole, part in ((dq, share[0]), (dk[keys], share[1]), (dv[keys], share[2])):
            whole += part
    return out, dq.movedim(0, -2), dk.movedim(0, -2), dv.movedim(0, -2), lse


def errors_in_parts(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """Worst row of every case, dtype and name, and what it may be."""
    found: dict[str, tuple[float, float]] = {}
    device = torch.device("cuda", torch.cuda.current_device())
    problems: dict[str, tuple[int, int, list[tuple[slice, bool]]]] = {
        name: (queries, keys, [(slice(0, keys), False)]) for name, (queries, keys) in WITHOUT_CAUSE.items()
    }
    for name, (others, own) in CASES.items():
        edges = [0]
        for length in (*others, own):
            edges.append(edges[-1] + length)
        places = [slice(*pair) for pair in pairwise(edges)]
        problems[name] = (own, edges[-1], [(place, place is places[-1]) for place in places])
    for name, (queries, keys, parts) in problems.items():
        hidden = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        if parts[-1][1]:
            hidden = torch.ones_like(hidden).triu(keys - queries + 1)
        for dtype in DTYPES:
            normal = Tensors(device, dtype, seed=3).normal
            tensors = [
                normal(M, G, queries, D),
                normal(M, keys, D),
                normal(M, keys, D),
                normal(M, G, queries, D),
            ]
            got, want = by_parts(tensors, parts), plain(tensors, hidden, torch.float64)
            low = plain(tensors, hidden, dtype)
            lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            assert (got[4].shape, got[4].dtype) == ((M, G, queries), lse_dtype), name
            for what, *values in zip(NAMES, got[:4], low[:4], want[:4], strict=True):
                assert values[0].dtype == dtype, (name, what)
                ours, theirs = worst_row(values[0], values[2]), worst_row(values[1], values[2])
                found[f"{name}, {dtype}, {what}"] = ours, 2 * theirs + ROUNDING[dtype]
            found[f"{name}, {dtype}, lse"] = worst_row(got[4], want[4]), LSE_ROUNDING
    return found


def packed_spans(rank: int, world_size: int) -> dict[str, tuple[str, float, float]]:
    """Of every kernel: why it refuses; the worst row over packs of spans relative to what it may be.

    Spans of several documents, causal ones with keys before the queries where the kernel takes them, and keys
    that all queries of a span see; one query, few keys, lengths that are no multiples of anything.
    """
    found = {}
    device = torch.device("cuda", torch.cuda.current_device())
    normal = Tensors(device, torch.bfloat16, seed=5).normal
    scale = D**-0.5
    packs = {
        "causal": ([0, 1, 130, 300], [0, 1, 130, 300], True),
        "causal behind keys": ([0, 1, 130, 300], [0, 65, 300, 600], True),
        "all": ([0, 1, 130, 300], [0, 3, 200, 500], False),
    }
    for kernel in KERNELS[1:]:
        try:
            choose_by_rule(kernel, find_machine(device), torch.bfloat16, D)
            ratios = {}
            for name, (cu_q, cu_k, causal) in packs.items():
                q, dout = normal(cu_q[-1], M, G, D), normal(cu_q[-1], M, G, D)
                k, v = normal(cu_k[-1], M, D), normal(cu_k[-1], M, D)
                if cu_q != cu_k and causal and not takes_offset(q, kernel):
                    continue
                call = (cu_q, cu_k, causal, scale, kernel)
                keywords = {"causal": causal, "softmax_scale": scale, "kernel": kernel}
                out, lse = attention_forward(q, k, v, cu_q, cu_k, **keywords)
                grads = attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, **keywords)
                wide = [x.double() for x in (q, k, v)]
                want = tiled.forward(*wide, *call)
                exact = tiled.backward(dout.double(), *wide, want[0], want[1].flatten(0, 1), *call)
                low = tiled.backward(dout, q, k, v, out, lse.flatten(0, 1), *call)
                ratios[f"{name}: lse"] = worst_row(lse, want[1]) / LSE_ROUNDING
                # one rounding of the output to 16 bits, and half as much inside
                ratios[f"{name}: out"] = worst_row(out, want[0]) / 2.0**-7
                for what, got, plain_torch, right in zip(NAMES[1:], grads, low, exact, strict=True):
                    allowed = 2 * worst_row(plain_torch, right) + 2.0**-7
                    ratios[f"{name}: {what}"] = worst_row(got, right) / allowed
            worst = max(ratios, key=lambda key: ratios[key])
            found[kernel] = (worst, ratios[worst], 1.0)
        except (RuntimeError, ImportError, ValueError, TypeError) as error:
            found[kernel] = (f"{type(error).__name__}: {error}", math.nan, 0.0)
    return found


def dense_baseline(rank: int, world_size: int) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Of every backend and use: why it refuses; the worst row of some heads, and what that may be."""
    found = {}
    S, heads, groups = 2048, M3.num_heads, M3.num_kv_heads
    normal = Tensors(torch.device("cuda"), torch.bfloat16, seed=4).normal
    k, v = (normal(1, groups, S, D).requires_grad_() for _ in range(2))
    for use, queries in (("training", S), ("decode", 1)):
        q = normal(1, heads, queries, D).requires_grad_()
        dout = normal(*q.shape)
        group = slice(M3.heads_per_group, 2 * M3.heads_per_group)
        some = (q[0, None, group], k[0, 1:2], v[0, 1:2], dout[0, None, group])
        hidden = torch.ones(queries, S, dtype=torch.bool, device=q.device).triu(S - queries + 1)
        for backend, make in CANDIDATES.items():
            with warnings.catch_warnings(record=True) as said:
                # torch says in warnings what it does not like
                warnings.simplefilter("always")
                try:
                    out = make()(q, k, v, queries > 1)
                    # a decoded token is not learnt from
                    grads = torch.autograd.grad(out, (q, k, v), dout) if use == "training" else ()
                except (RuntimeError, ImportError) as error:
                    reasons = "; ".join(str(warning.message) for warning in said)
                    found[use, backend] = (f"{error}; {reasons}", math.nan, 0.0)
                    continue
            got = [x[0, None, group] for x in (out, *grads[:1])] + [x[0, 1:2] for x in grads[1:]]
            want, low = plain(some, hidden, torch.float64), plain(some, hidden, torch.bfloat16)
            pairs = [(worst_row(a, c), 2 * worst_row(b, c)) for a, b, c in zip(got, low, want, strict=False)]
            found[use, backend] = ("", *max(pairs, key=lambda pair: pair[0] / pair[1]))
    return found


PARTS = Job(errors_in_parts)
PACKED = Job(packed_spans)
BASELINE = Job(dense_baseline) if HAS_GPU else None


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *WITHOUT_CAUSE])
def test_parts_are_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    found = {key: pair for key, pair in PARTS.result().items() if key.startswith(f"{name}, {dtype}, ")}
    assert len(found) == len(NAMES) + 1
    assert {key: pair for key, pair in found.items() if not pair[0] <= pair[1]} == {}


@needs_device
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_every_kernel_takes_packed_spans(kernel: str) -> None:
    """A kernel that is not installed, or not for this GPU, is skipped with its reason; a wrong one fails."""
    said, error, allowed = PACKED.result()[kernel]
    if said.startswith("ValueError"):
        pytest.skip(said)
    assert error <= allowed, f"{kernel}: {said}"


@needs_gpu
@pytest.mark.parametrize("use", ["training", "decode"])
@pytest.mark.parametrize("backend", list(CANDIDATES))
def test_dense_baseline_runs(backend: str, use: str) -> None:
    """What MSA is compared with, at M3's sizes; a backend that is not to be had here is no fault of ours."""
    assert BASELINE is not None
    refusal, error, allowed = BASELINE.result()[use, backend]
    if refusal:
        pytest.skip(f"{backend}, {use}: {refusal}")
    assert error <= allowed
