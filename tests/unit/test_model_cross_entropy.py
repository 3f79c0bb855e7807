"""The tiled loss: as exact as sums in fp32 allow, whatever the tiles, and over a cut vocabulary."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from msa_train.data import IGNORE_LABEL
from msa_train.model.layers import cross_entropy
from msa_train.model.layers.cross_entropy import linear_cross_entropy
from msa_train.model.layers.wide_products import add_product, wide_product
from tests.helpers.compare import assert_rows_close
from tests.helpers.spawn import run_ranks

T, H, V = 300, 32, 1500


class OneRank:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    # some words are nearly certain: their 1 - p must not be lost
    weight = (torch.randn(V, H, generator=generator) * 0.5).to(dtype)
    labels = (hidden.float() @ weight.float().T).argmax(1)
    labels[::2] = torch.randint(0, V, (T // 2,), generator=generator)
    labels[::7] = IGNORE_LABEL
    return hidden, weight, labels, torch.rand(T, generator=generator) / T


def run(loss: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Losses and gradients in fp64 of `loss(hidden, weight, labels)`; the bf16 problem brought to dtype."""
    hidden, weight, labels, scale = problem(torch.bfloat16)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    losses = loss(hidden, weight, labels)  # type: ignore[operator]
    grads = torch.autograd.grad((losses * scale.to(losses.dtype)).sum(), (hidden, weight))
    return losses.detach().double(), *(grad.double() for grad in grads)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, IGNORE_LABEL, OneRank())  # type: ignore[arg-type]


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_LABEL, reduction="none")


def rounded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What one pass over whole logits gives: bf16 logits, softmax in fp32, bf16 gradients."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE_LABEL, reduction="none")


@pytest.mark.parametrize("tile", [(8192, 2**26), (128, 128 * 400), (37, 37 * 101), (T, 1)])
def test_bf16_is_as_exact_as_one_tile_whatever_the_tiles(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    """Worst row of loss and gradients, against fp64 on the same bf16 numbers."""
    monkeypatch.setattr(cross_entropy, "_TILE_ROWS", tile[0])
    monkeypatch.setattr(cross_entropy, "_TILE_ELEMENTS", max(tile[1], tile[0] * 50))
    want = run(exact, torch.float64)
    got, whole = run(ours, torch.bfloat16), run(rounded, torch.bfloat16)
    for a, b, reference in zip(got, whole, want, strict=True):
        rows = reference.reshape(len(reference), -1)
        error = (a.reshape(rows.shape) - rows).norm(dim=1)
        usual = (b.reshape(rows.shape) - rows).norm(dim=1)
        assert error.max() <= usual.max() * 1.01
    labels = problem(torch.bfloat16)[2]
    assert (got[0][labels == IGNORE_LABEL] == 0).all()


def test_gradients_are_made_only_where_they_are_wanted() -> None:
    hidden, weight, labels, _ = problem(torch.float64)
    ours(hidden.requires_grad_(), weight, labels).sum().backward()
    assert weight.grad is None
    alone = hidden.grad
    hidden.grad = None
    ours(hidden, weight.requires_grad_(), labels).sum().backward()
    assert torch.equal(alone, hidden.grad)  # type: ignore[arg-type]


def test_no_temporary_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a backward pass makes beside the two gradients is a tile."""
    monkeypatch.setattr(cross_entropy, "_TILE_ROWS", 64)
    monkeypatch.setattr(cross_entropy, "_TILE_ELEMENTS", 64 * 100)
    hidden, weight, labels, _ = problem(torch.bfloat16)
    loss = ours(hidden.requires_grad_(), weight.requires_grad_(), labels).sum()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None):  # type: ignore[no-untyped-def, override]
            out = func(*args, **(kwargs or {}))  # type: ignore[operator, call-overload]
            if isinstance(out, Tensor) and out._base is None:
                sizes.append(out.numel())
            return out

    with Watch():
        torch.autograd.grad(loss, (hidden, weight))
    assert sorted(sizes)[-1] == V * H
    assert sum(size > max(64 * 100, T * H) for size in sizes) == 1


def test_products_that_come_out_wide() -> None:
    left, right = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    assert wide_product(left, right, torch.float32).dtype == torch.float32
    total = torch.ones(5, 3)
    add_product(total, left, right)
    assert_rows_close(total, 1 + left.float() @ right.float(), 1e-6)
    doubles = torch.ones(5, 3, dtype=torch.float64)
    add_product(doubles, left.double(), right.double())
    assert_rows_close(doubles, 1 + left.double() @ right.double(), 1e-14)


def over_two_ranks(rank: int, world_size: int) -> None:
    cross_entropy._TILE_ROWS, cross_entropy._TILE_ELEMENTS = 128, 128 * 200
    hidden, weight, labels, scale = problem(torch.float64)
    part = slice(rank * V // 2, (rank + 1) * V // 2)
    mine = weight[part].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    got = linear_cross_entropy(hidden, mine, labels, IGNORE_LABEL, group)
    dhidden, dweight = torch.autograd.grad((got * scale).sum(), (hidden, mine))
    dist.all_reduce(dhidden)
    weight.requires_grad_()
    want = exact(hidden, weight, labels)
    want_hidden, want_weight = torch.autograd.grad((want * scale).sum(), (hidden, weight))
    assert_rows_close(got, want, 1e-13)
    assert_rows_close(dhidden, want_hidden, 1e-13)
    assert_rows_close(dweight, want_weight[part], 1e-13)


def test_vocabulary_over_two_ranks() -> None:
    run_ranks(2, over_two_ranks)
