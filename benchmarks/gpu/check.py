"""Is what is timed right? Every kernel against fp64 on fresh inputs, worst row, before anything is timed.

Attention may have twice the error of plain torch in the same dtype; the selection may differ from the exact
one only where two scores are closer than rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from msa_kernels import decode_attention, quantize_index_keys, select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.pool import (
    BlockPool,
    KlTerm,
    SparseQueries,
    pool_backward,
    pool_forward,
)
from msa_kernels.block_sparse_attention.reference import attention_reference, kl_reference, selection_mask
from msa_kernels.decode.cache import DecodeCache
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from benchmarks.gpu.problem import LayerSizes, Tensors

# Of a score, relative to the largest: products are exact, their sums are fp32.
SCORE_ROUNDING = 1e-5
# Of an fp32 number.
ROUNDING = 2.0**-23
NAMES = ("out", "dq", "dk", "dv", "dq_index", "dk_index", "kl")


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. error, allowed: of the worst row; text: why nothing could be compared, if so."""

    name: str
    error: float
    allowed: float
    text: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return not self.text and self.error <= self.allowed


def run_checks(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int, num_queries: int
) -> list[Check]:
    """All checks; a kernel that cannot run is a check that failed, and the others go on."""
    problem = _Problem(tensors, sizes, seq_len, num_queries)
    parts: dict[str, Callable[[], list[Check]]] = {
        "selection": lambda: [_selection(problem, kernel)],
        "selected log-sum-exp": lambda: [_selected_lse(problem, kernel)],
        "attention": lambda: _attention(problem, kernel),
        "dense": lambda: _dense_kl(problem, kernel),
        "decode": lambda: [_decode(tensors, sizes, seq_len, kernel)],
        "decode, fp8 index keys": lambda: [_decode_fp8(tensors, sizes, seq_len, kernel)],
    }
    found: list[Check] = []
    for name, part in parts.items():
        try:
            found += part()
        except Exception as error:
            # whatever a compiler or driver says: a first run on new hardware should report all of it
            found.append(Check(name, float("nan"), 0.0, f"{type(error).__name__}: {error}".splitlines()[0]))
    return found


class _Problem:
    """Some queries of a pack of two documents against all its keys."""

    def __init__(self, tensors: Tensors, sizes: LayerSizes, seq_len: int, num_queries: int) -> None:
        M, G, D, Di = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim, sizes.index_head_dim
        S, T, normal = seq_len, num_queries, tensors.normal
        self.sizes, self.seq_len = sizes, S
        self.inputs = [normal(T, M, G, D), normal(S, M, D), normal(S, M, D), normal(T, M, Di), normal(S, Di)]
        self.dout = normal(T, M, G, D)
        order = torch.randperm(S, generator=tensors.generator, device=tensors.device)
        self.position = order[:T].sort().values
        self.cu_seqlens = torch.tensor([0, S // 4 // sizes.block_size * sizes.block_size, S])
        self.scales = {"softmax_scale": D**-0.5, "index_scale": Di**-0.5}

    def select(self, kernel: str) -> Tensor:
        """[T, M, K] int32."""
        return select_blocks(
            self.inputs[3], self.inputs[4], self.cu_seqlens, block_size=self.sizes.block_size,
            topk=self.sizes.topk, position=self.position, kernel=kernel,
        )  # fmt: skip


def _selection(problem: _Problem, kernel: str) -> Check:
    """How far below the best left-out block a taken one lies, relative to the largest score."""
    B, NB = problem.sizes.block_size, problem.seq_len // problem.sizes.block_size
    ids = problem.select(kernel).long()
    q, k = problem.inputs[3].double(), problem.inputs[4].double()
    scores = torch.einsum("tmd,sd->tms", q, k).unflatten(-1, (NB, B)).amax(-1)
    own = problem.position // B
    starts = problem.cu_seqlens.to(own.device)
    first = starts[torch.searchsorted(starts, problem.position, right=True) - 1] // B
    block = torch.arange(NB, device=own.device)
    candidate = ((block >= first[:, None]) & (block < own[:, None]))[:, None].expand_as(scores)
    chosen = torch.zeros(*scores.shape[:2], NB + 1, dtype=torch.bool, device=own.device)
    chosen = chosen.scatter_(2, torch.where(ids >= 0, ids, NB), True)[..., :NB]
    wanted = (own - first + 1).clamp(max=problem.sizes.topk)
    legal = (chosen & ~candidate).sum(-1) == 1
    legal &= chosen.gather(2, own[:, None, None].expand(-1, scores.shape[1], 1)).squeeze(-1)
    legal &= chosen.sum(-1) == wanted[:, None]
    if not bool(legal.all()):
        return Check("selection", float("nan"), 0.0, f"{int((~legal).sum())} rows are no selection at all")
    worst_in = scores.masked_fill(~(chosen & candidate), float("inf")).amin(-1)
    best_out = scores.masked_fill(chosen | ~candidate, float("-inf")).amax(-1)
    gap = (best_out - worst_in).clamp(min=0.0).max() / scores.abs().max()
    return Check("selection", float(gap), SCORE_ROUNDING)


def _selected_lse(problem: _Problem, kernel: str) -> Check:
    """Of the blocks that the kernel itself took; relative to the largest."""
    q, k = problem.inputs[3], problem.inputs[4]
    B, position = problem.sizes.block_size, problem.position
    scale = problem.scales["index_scale"]
    ids, lse = select_blocks(
        q, k, problem.cu_seqlens, block_size=B, topk=problem.sizes.topk, position=position, kernel=kernel,
        return_lse=True, index_scale=scale,
    )  # fmt: skip
    mask = selection_mask(ids.cpu(), position.cpu(), seq_len=problem.seq_len, block_size=B).to(q.device)
    scores = torch.einsum("tmd,sd->tms", q.double(), k.double()) * scale
    exact = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
    return Check("selected log-sum-exp", _worst_row(lse, exact), SCORE_ROUNDING * float(exact.abs().max()))


def _dense_kl(problem: _Problem, kernel: str) -> list[Check]:
    """Value and gradients of the warm-up's loss, of as many tokens as there are queries."""
    q, q_index = problem.inputs[0], problem.inputs[3]
    T = q.shape[0]
    k, k_index = problem.inputs[1][:T], problem.inputs[4][:T]
    heads, keys, index = q.permute(1, 2, 0, 3), k.transpose(0, 1), q_index.transpose(0, 1)
    softmax_scale, index_scale = problem.scales["softmax_scale"], problem.scales["index_scale"]
    lse = lse_part(heads, keys, causal=True, softmax_scale=softmax_scale, kernel=kernel)
    lse_index = lse_part(
        index[:, None], k_index[None], causal=True, softmax_scale=index_scale, kernel=kernel
    )[:, 0]
    grads = dense_kl_part(
        heads, keys, lse, index, k_index, lse_index,
        causal=True, softmax_scale=softmax_scale, index_scale=index_scale, kernel=kernel,
    )  # fmt: skip
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[:, None].expand(-1, q.shape[1], -1)

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q_index, k_index)]
        kl = kl_reference(q.to(dtype), k.to(dtype), *leaves, mask, **problem.scales)
        return *torch.autograd.grad(kl, leaves), kl.detach().view(1)

    ours = grads.dq_index.transpose(0, 1), grads.dk_index, grads.kl.view(1)
    return [
        Check(f"dense {name}", _worst_row(a, c), _allowed(b, c))
        for name, a, b, c in zip(NAMES[4:], ours, plain(q.dtype), plain(torch.float64), strict=True)
    ]


def _attention(problem: _Problem, kernel: str) -> list[Check]:
    """Outputs and every gradient."""
    # the selection itself is checked elsewhere: any will do here
    ids = problem.select("cpu")
    ours = pool_run(problem.inputs, problem, ids, kernel)
    theirs = _plain_run(problem.inputs, problem, ids)
    exact = _plain_run([tensor.double() for tensor in problem.inputs], problem, ids)
    return [
        Check(f"attention {name}", _worst_row(a, c), _allowed(b, c))
        for name, a, b, c in zip(NAMES, ours, theirs, exact, strict=True)
    ]


def _allowed(plain: Tensor, exact: Tensor) -> float:
    """Twice the error of plain torch, which may hit a single number by chance: there its rounding too."""
    rounding = ROUNDING * float(exact.abs().max()) if exact.numel() == 1 else 0.0
    return 2 * _worst_row(plain, exact) + rounding


def pool_run(inputs: list[Tensor], problem: _Problem, ids: Tensor, kernel: str) -> tuple[Tensor, ...]:
    """What NAMES lists, by the operators over one pool of all blocks."""
    q, k, v, q_index, k_index = inputs
    B, M = problem.sizes.block_size, problem.sizes.num_kv_heads
    NB = problem.seq_len // B
    queries = SparseQueries(
        q, problem.position, problem.scales["softmax_scale"],
        q_index, k_index.view(NB, B, -1), problem.scales["index_scale"],
    )  # fmt: skip
    pool = BlockPool(pack_blocks(k, v, B), torch.arange(NB, device=q.device).repeat(M))
    first = torch.arange(M, device=q.device)[:, None] * NB
    entries = torch.where(ids >= 0, ids.long() + first, -1)
    part = pool_forward(queries, pool, entries, kernel=kernel)
    assert part.lse_index is not None, "called with an index branch"
    dout = problem.dout.to(part.out.dtype)
    delta = (dout * part.out).sum(-1)
    term = KlTerm(part.lse_index, weight=1.0)
    grads = pool_backward(queries, pool, entries, dout, delta, part.lse, term, kernel=kernel)
    assert grads.dq_index is not None, "called with a KL term"
    assert grads.dk_index is not None, "called with a KL term"
    assert grads.kl is not None, "called with a KL term"
    dk, dv = unpack_blocks(grads.dkv, M)
    dk_index = grads.dk_index.view(M, problem.seq_len, -1).sum(0)
    return part.out, grads.dq, dk, dv, grads.dq_index, dk_index, grads.kl.view(1)


def _plain_run(inputs: list[Tensor], problem: _Problem, ids: Tensor) -> tuple[Tensor, ...]:
    """The same by the definitions with a mask over all tokens and autograd, all in the inputs' dtype."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    q, k, v, q_index, k_index = leaves
    size = {"seq_len": problem.seq_len, "block_size": problem.sizes.block_size}
    mask = selection_mask(ids.cpu(), problem.position.cpu(), **size).to(q.device)
    out, _ = attention_reference(q, k, v, mask, softmax_scale=problem.scales["softmax_scale"])
    dq, dk, dv = torch.autograd.grad(out, leaves[:3], problem.dout.to(out.dtype))
    kl = kl_reference(q, k, q_index, k_index, mask, **problem.scales)
    index_grads = torch.autograd.grad(kl, leaves[3:])
    return out.detach(), dq, dk, dv, *index_grads, kl.detach().view(1)


def _decode(tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> Check:
    """Output of the newest token of two sequences; both runs take the blocks that the kernel chose."""
    M, G, D = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim
    normal = tensors.normal
    k, v = (normal(2, seq_len, M, D) for _ in range(2))
    cache = DecodeCache(k=k, v=v, k_index=normal(2, seq_len, sizes.index_head_dim))
    q, q_index = normal(2, M * G, D), normal(2, M, sizes.index_head_dim)
    lengths = [seq_len, seq_len // 2 - 3]
    lens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    out, _, ids = decode_attention(
        q, q_index, cache, lens, block_size=sizes.block_size, topk=sizes.topk, kernel=kernel
    )
    error = allowed = 0.0
    for b, length in enumerate(lengths):
        position = torch.tensor([length - 1])
        mask = selection_mask(ids[b : b + 1].cpu(), position, seq_len=seq_len, block_size=sizes.block_size)
        mask = mask.to(q.device)

        def plain(dtype: torch.dtype, b: int = b, mask: Tensor = mask) -> Tensor:
            rows = (x[b].to(dtype) for x in (q.view(2, 1, M, G, D), k, v))
            return attention_reference(*rows, mask, softmax_scale=D**-0.5)[0]

        exact = plain(torch.float64)
        error = max(error, _worst_row(out[b].view(1, M, G, D), exact))
        allowed = max(allowed, 2 * _worst_row(plain(q.dtype), exact))
    return Check("decode", error, allowed)


def _decode_fp8(tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> Check:
    """How far below the best left-out block a taken one lies, by fp64 scores of the very same fp8 keys."""
    M, G, D, B = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim, sizes.block_size
    k = tensors.normal(1, seq_len, M, D)
    keys, scale = quantize_index_keys(tensors.normal(1, seq_len, sizes.index_head_dim))
    q, q_index = tensors.normal(1, M * G, D), tensors.normal(1, M, sizes.index_head_dim)
    ids = decode_attention(
        q, q_index, DecodeCache(k, k, keys, k_index_scale=scale),
        torch.tensor([seq_len], dtype=torch.int32, device=q.device),
        block_size=B, topk=sizes.topk, kernel=kernel,
    )[2][0].long()  # fmt: skip
    scores = q_index[0].double() @ (keys[0].double() * scale[0, :, None].double()).T
    scores = scores.unflatten(-1, (-1, B)).amax(-1)[:, :-1]
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids[:, :-1], True)
    name = "decode, fp8 index keys"
    if int(taken.sum()) != M * (sizes.topk - 1) or not bool((ids[:, -1] == seq_len // B - 1).all()):
        return Check(name, float("nan"), 0.0, f"no selection: {ids.tolist()}")
    worst_in = scores.masked_fill(~taken, float("inf")).amin(-1)
    best_out = scores.masked_fill(taken, float("-inf")).amax(-1)
    gap = (best_out - worst_in).clamp(min=0.0).max() / scores.abs().max()
    return Check(name, float(gap), SCORE_ROUNDING)


def _worst_row(got: Tensor, want: Tensor) -> float:
    """Largest error of any value; NaN if any is."""
    return float((got.double() - want.double()).abs().max())
