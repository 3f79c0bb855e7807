"""Dense attention in parts: merged result and gradients equal one softmax over all keys."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from msa_kernels.full_attention import op, tiled, torch_cpu
from msa_kernels.full_attention.op import attention_backward, attention_forward, merge_parts
from torch import Tensor

from tests.helpers.compare import assert_rows_close

M, G, D, SCALE = 2, 3, 16, 0.3


def problem(num_queries: int, num_keys: int, seed: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_queries, M, G, D), (num_keys, M, D), (num_keys, M, D), (num_queries, M, G, D))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain(tensors: Sequence[Tensor], hidden: Tensor) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients by the definition; hidden [Q, K]."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    scores = (torch.einsum("qmgd,kmd->mgqk", q, k) * SCALE).masked_fill(hidden, float("-inf"))
    out = torch.einsum("mgqk,kmd->qmgd", scores.softmax(-1), v)
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


@pytest.mark.parametrize("kind", ["torch", "tiled"])
@pytest.mark.parametrize("prefix", [0, 1, 37])
def test_parts_merge_exactly(prefix: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Q = 50
    if kind == "tiled":
        monkeypatch.setattr(tiled, "TILE", 16)
        monkeypatch.setattr(op, "module_of", lambda *_: tiled)
    q, k, v, dout = tensors = problem(Q, prefix + Q, prefix)
    want = plain(tensors, torch.ones(Q, prefix + Q).triu(prefix + 1).bool())
    parts = [(slice(prefix, None), True)] + ([(slice(0, prefix), False)] if prefix else [])
    out, lse = torch.zeros_like(q), torch.full((M, G, Q), float("-inf"), dtype=q.dtype)
    limits = {causal: [0, k[keys].shape[0]] for keys, causal in parts}
    for keys, causal in parts:
        part = attention_forward(
            q, k[keys], v[keys], [0, Q], limits[causal], causal=causal, softmax_scale=SCALE
        )
        by_head = out.permute(1, 2, 0, 3), part[0].permute(1, 2, 0, 3)
        merged, lse = merge_parts(by_head[0], lse, by_head[1], part[1])
        out = merged.permute(2, 0, 1, 3)
    assert_rows_close(out, want[0], 1e-12)
    assert_rows_close(lse, want[1], 1e-12)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for keys, causal in parts:
        shares = attention_backward(
            dout, q, k[keys], v[keys], out, lse, [0, Q], limits[causal], causal=causal, softmax_scale=SCALE
        )
        for whole, share in zip((grads[0], grads[1][keys], grads[2][keys]), shares, strict=True):
            whole += share
    for got, ref in zip(grads, want[2:], strict=True):
        assert_rows_close(got, ref, 1e-11)


@pytest.mark.parametrize("tile", [4, 7, 1024])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_over_several_spans(causal: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of different lengths, causal ones with more keys than queries, in one call."""
    monkeypatch.setattr(tiled, "TILE", tile)
    cu_q, cu_k = [0, 1, 12, 30], [0, 5, 16, 45]
    q, k, v, dout = tensors = problem(30, 45, 3)
    hidden = torch.ones(30, 45, dtype=torch.bool)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        ahead = (d - c) - (b - a)
        hidden[a:b, c:d] = torch.ones(b - a, d - c).triu(ahead + 1).bool() if causal else False
    want = plain(tensors, hidden)
    out, lse = tiled.forward(q, k, v, cu_q, cu_k, causal, SCALE, "tiled")
    grads = tiled.backward(dout, q, k, v, out, lse.flatten(0, 1), cu_q, cu_k, causal, SCALE, "tiled")
    for got, ref in zip((out, lse, *grads), want, strict=True):
        assert_rows_close(got, ref, 1e-12)


def test_one_call_for_many_spans() -> None:
    cu_q, cu_k = [0, 3, 10, 11], [0, 3, 10, 11]
    q, k, v, dout = problem(11, 11, 4)
    many = attention_forward(q, k, v, cu_q, cu_k, causal=True, softmax_scale=SCALE)
    grads = attention_backward(dout, q, k, v, *many, cu_q, cu_k, causal=True, softmax_scale=SCALE)
    for a, b in pairwise(cu_q):
        one = [x[a:b] for x in (q, k, v)]
        out, lse = attention_forward(*one, [0, b - a], [0, b - a], causal=True, softmax_scale=SCALE)
        assert torch.equal(out, many[0][a:b])
        assert torch.equal(lse, many[1][:, :, a:b])
        alone = attention_backward(
            dout[a:b], *one, out, lse, [0, b - a], [0, b - a], causal=True, softmax_scale=SCALE
        )
        assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, grads, strict=True))


def test_merge_with_an_empty_part() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged = merge_parts(out, lse, torch.zeros(3, 4), torch.full((3,), float("-inf")))
    assert all(torch.equal(a, b) for a, b in zip(merged, (out, lse), strict=True))
    empty = torch.full((3,), float("-inf"))
    nothing = merge_parts(torch.zeros(3, 4), empty, torch.zeros(3, 4), empty)
    assert not nothing[0].any()
    assert (nothing[1] == float("-inf")).all()


def test_merged_outputs_take_the_wider_dtype() -> None:
    wide, narrow = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.bfloat16)
    assert merge_parts(wide, torch.zeros(3), narrow, torch.zeros(3))[0].dtype == torch.float32


def test_no_gradient_per_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys' gradients leave the kernel summed over the group: they are never made once per query head."""
    shapes = []
    kernel = torch_cpu._BACKWARD

    def spy(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        result = kernel(*args, **kwargs)
        shapes.extend(tuple(x.shape) for x in result[1:])
        return result

    monkeypatch.setattr(torch_cpu, "_BACKWARD", spy)
    q, k, v, dout = problem(4, 9, 5)
    out, lse = attention_forward(q, k, v, [0, 4], [0, 9], causal=False, softmax_scale=SCALE)
    attention_backward(dout, q, k, v, out, lse, [0, 4], [0, 9], causal=False, softmax_scale=SCALE)
    assert shapes == [(M, 1, 9, D)] * 2
