"""Sliding windows: blocks, visible tokens and gradients against masked attention in fp64."""

import pytest
import torch
from msa_kernels import block_sparse_attention, window_blocks
from msa_kernels.block_sparse_attention import tiled_chunk as pool_module
from msa_kernels.block_sparse_attention.reference import attention_reference, window_mask
from torch import Tensor

from tests.helpers.compare import assert_rows_close

S, BLOCK_SIZE, PADDING = 96, 8, 3
LAYOUTS = {"one": [0, 96], "packed": [0, 8, 48, 96]}


def positions(starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Position, document start and validity (the last tokens are padding) of every token."""
    position, borders = torch.arange(S), torch.tensor(starts)
    return position, borders[torch.searchsorted(borders, position, right=True) - 1], position < S - PADDING


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(S, 4, 10), (S, 2, 10), (S, 2, 10)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 3, 8, 9, 13, 16, 40, 96, 200])
@pytest.mark.parametrize("starts", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_masked_attention(
    starts: list[int], window: int, sink_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tiles, so that several chunks, batches and half-filled items occur.
    monkeypatch.setattr(pool_module, "_SLOT_ELEMENTS", 4096)
    monkeypatch.setattr(pool_module, "_TILE_ELEMENTS", 4096)
    position, doc_start, valid = positions(starts)
    q, k, v = tensors(torch.float64)
    blocks, edges = window_blocks(
        position,
        doc_start,
        block_size=BLOCK_SIZE,
        num_blocks=S // BLOCK_SIZE,
        window=window,
        sink_blocks=sink_blocks,
        query_valid=valid,
    )
    out, lse = block_sparse_attention(
        q, k, v, blocks[:, None].expand(-1, 2, -1), block_size=BLOCK_SIZE, window=edges
    )
    mask = window_mask(
        position, doc_start, seq_len=S, block_size=BLOCK_SIZE, window=window, sink_blocks=sink_blocks
    )
    mask = mask[:, None].expand(-1, 2, -1)
    want, want_lse = attention_reference(q.view(S, 2, 2, 10), k, v, mask, softmax_scale=10**-0.5)
    want = want.flatten(1, 2)
    assert_rows_close(out[valid], want[valid], 1e-12)
    assert_rows_close(lse[valid], want_lse.flatten(1)[valid], 1e-12)
    assert not out[~valid].any()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got_grads = torch.autograd.grad(out, (q, k, v), dout)
    want_grads = torch.autograd.grad(want[valid], (q, k, v), dout[valid])
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_rows_close(a, b, 1e-11)


@pytest.mark.parametrize("starts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sink_blocks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 2, 8, 9, 10, 17, 300])
def test_blocks_are_those_with_a_visible_token(starts: list[int], window: int, sink_blocks: int) -> None:
    position, doc_start, valid = positions(starts)
    sizes = {"block_size": BLOCK_SIZE, "window": window, "sink_blocks": sink_blocks}
    blocks, _ = window_blocks(position, doc_start, num_blocks=S // BLOCK_SIZE, query_valid=valid, **sizes)
    mask = window_mask(position, doc_start, seq_len=S, **sizes)
    for i, row in enumerate(blocks.tolist()):
        visible = mask[i].nonzero().squeeze(-1).div(BLOCK_SIZE, rounding_mode="floor").unique().tolist()
        want = visible if valid[i] else []
        assert row == want + [-1] * (len(row) - len(want))


def test_example() -> None:
    """The example of the docstring."""
    position, doc_start = torch.tensor([13]), torch.tensor([0])
    blocks, edges = window_blocks(position, doc_start, block_size=4, num_blocks=4, window=6, sink_blocks=1)
    assert blocks.tolist() == [[0, 2, 3, -1]]
    assert edges.start.tolist() == [8]
    assert edges.sink_stop.tolist() == [4]


def test_blocks_before_the_window_add_nothing() -> None:
    """Blocks given by the caller that hold no visible token are skipped, in both directions."""
    position, doc_start, _ = positions([0, 96])
    q, k, v = tensors(torch.float64)
    blocks, edges = window_blocks(position, doc_start, block_size=BLOCK_SIZE, num_blocks=12, window=10)
    every = torch.arange(12).expand(S, 1, 12)
    every = torch.where(every <= (position // BLOCK_SIZE)[:, None, None], every, -1).expand(-1, 2, -1)
    results = []
    for ids in (blocks[:, None].expand(-1, 2, -1), every):
        out, lse = block_sparse_attention(q, k, v, ids, block_size=BLOCK_SIZE, window=edges)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert_rows_close(a, b, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_most_twice_the_error_of_torch(dtype: torch.dtype) -> None:
    """Worst row against fp64 must be within twice that of a plain torch run in the same dtype."""
    position, doc_start, _ = positions(LAYOUTS["packed"])
    sizes = {"block_size": BLOCK_SIZE, "window": 21, "sink_blocks": 1}
    blocks, edges = window_blocks(position, doc_start, num_blocks=S // BLOCK_SIZE, **sizes)
    mask = window_mask(position, doc_start, seq_len=S, **sizes)[:, None].expand(-1, 2, -1)
    low = [x.detach().requires_grad_() for x in tensors(dtype)]
    wide = [x.detach().double().requires_grad_() for x in low]
    dout = torch.randn(S, 4, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def plain(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v = inputs
        out = attention_reference(q.view(S, 2, 2, 10), k, v, mask, softmax_scale=10**-0.5)[0].flatten(1, 2)
        return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))

    out, _ = block_sparse_attention(
        *low, blocks[:, None].expand(-1, 2, -1), block_size=BLOCK_SIZE, window=edges
    )
    got = (out, *torch.autograd.grad(out, low, dout.to(dtype)))
    for name, a, b, c in zip(["out", "dq", "dk", "dv"], got, plain(low), plain(wide), strict=True):
        ours, theirs = (a.double() - c).abs().amax(-1).max(), (b.double() - c).abs().amax(-1).max()
        assert ours <= 2 * theirs + 1e-12, f"{name}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize(
    ("sizes", "words"), [({"window": 0}, "window=0"), ({"window": 4, "sink_blocks": -1}, "sink_blocks=-1")]
)
def test_bad_sizes(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        window_blocks(torch.arange(4), torch.zeros(4), block_size=4, num_blocks=1, **sizes)


def test_window_of_another_length_is_refused() -> None:
    q = torch.zeros(8, 1, 4)
    blocks, edges = window_blocks(
        torch.arange(4), torch.zeros(4, dtype=torch.int64), block_size=4, num_blocks=2, window=2
    )
    with pytest.raises(ValueError, match=r"window\.start\.shape=\(4,\)"):
        block_sparse_attention(q, q, q, blocks[:1, None].expand(8, 1, -1), block_size=4, window=edges)
