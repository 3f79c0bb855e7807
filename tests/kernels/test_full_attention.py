"""Dense attention in parts: merged result and gradients equal one softmax over all keys."""

import pytest
import torch
from msa_kernels.full_attention import op
from msa_kernels.full_attention.op import attention_part, attention_part_backward, merge_parts

from tests.helpers.compare import assert_rows_close


@pytest.mark.parametrize("tiled", [False, True], ids=["torch_flash", "tiled"])
@pytest.mark.parametrize("prefix", [0, 1, 37])
def test_parts_merge_exactly(prefix: int, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    M, G, Q, D, scale = 2, 3, 50, 16, 0.3
    if tiled:
        monkeypatch.setattr(op, "_TILE", 16)
    generator = torch.Generator().manual_seed(prefix)
    q = torch.randn(M, G, Q, D, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(M, prefix + Q, D, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    scores = torch.einsum("mgqd,mkd->mgqk", q, k) * scale
    hidden = torch.ones(Q, prefix + Q).triu(prefix + 1).bool()
    scores = scores.masked_fill(hidden, float("-inf"))
    expected = torch.einsum("mgqk,mkd->mgqd", scores.softmax(-1), v)
    dout = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad(expected, (q, k, v), dout)

    with torch.no_grad():
        parts = [(slice(prefix, None), True)] + ([(slice(0, prefix), False)] if prefix else [])
        out, lse = torch.zeros_like(q), torch.full_like(q[..., 0], float("-inf"))
        for keys, causal in parts:
            if tiled:
                k4, v4 = (x[:, None, keys].expand(-1, G, -1, -1) for x in (k, v))
                part = op._tiled_forward(q, k4, v4, causal, scale)
            else:
                part = attention_part(q, k[:, keys], v[:, keys], causal=causal, softmax_scale=scale)
            out, lse = merge_parts(out, lse, *part)
        assert_rows_close(out, expected, 1e-12)
        assert_rows_close(lse, scores.logsumexp(-1), 1e-12)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for keys, causal in parts:
            if tiled:
                k4, v4 = (x[:, None, keys].expand(-1, G, -1, -1) for x in (k, v))
                a, b, c = op._tiled_backward(dout, q, k4, v4, out, lse, causal, scale)
                b, c = b.sum(1), c.sum(1)
            else:
                a, b, c = attention_part_backward(
                    dout, q, k[:, keys], v[:, keys], out, lse, causal=causal, softmax_scale=scale
                )
            dq += a
            dk[:, keys] += b
            dv[:, keys] += c
    for got, ref in zip((dq, dk, dv), want, strict=True):
        assert_rows_close(got, ref, 1e-11)


def test_merge_with_an_empty_part() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged = merge_parts(out, lse, torch.zeros(3, 4), torch.full((3,), float("-inf")))
    assert all(torch.equal(a, b) for a, b in zip(merged, (out, lse), strict=True))
    empty = torch.full((3,), float("-inf"))
    nothing = merge_parts(torch.zeros(3, 4), empty, torch.zeros(3, 4), empty)
    assert not nothing[0].any()
    assert (nothing[1] == float("-inf")).all()
