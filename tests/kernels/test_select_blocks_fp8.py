"""Selection by scores of index queries and keys in 8 bits."""

import pytest
import torch
from msa_kernels import quantize_index_keys, select_blocks
from torch import Tensor

from tests.helpers.triton_env import needs_triton, run_triton

LEN, BLOCK, TOPK = 512, 16, 4
KERNELS = [pytest.param("triton", marks=needs_triton), "cpu", "reference"]


def select(q: Tensor, k: Tensor, kernel: str, *, fp8: bool = True, **changes: object) -> Tensor:
    """For the last queries of one document."""
    arguments = {"block_size": BLOCK, "topk": TOPK, "query_offset": k.shape[0] - q.shape[0], "kernel": kernel}
    return select_blocks(q, k, torch.tensor([0, k.shape[0]]), fp8=fp8, **(arguments | changes))


def run(kernel: str, q: Tensor, k: Tensor, **changes: object) -> Tensor:
    """Where this kernel runs."""
    return (run_triton if kernel == "triton" else lambda call, *args, **kw: call(*args, **kw))(
        select, q, k, kernel, **changes
    )


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (128, 128), (20, 48)])
def test_equals_the_selection_of_the_rounded_values(kernel: str, dim: int, block_size: int) -> None:
    """In fp64, wherever last chosen and first refused score are apart by more than sums round."""
    length = LEN // block_size * block_size
    q, k = normal(64, 2, dim, seed=1), normal(length, dim, seed=2)
    # tokens of very unequal size: their factors decide
    k = k * torch.randint(0, 4, (length, 1), generator=torch.Generator().manual_seed(3)).half().exp2()
    got = run(kernel, q, k, block_size=block_size, topk=2)
    keys, scale = quantize_index_keys(k)
    queries, factor = quantize_index_keys(q)
    exact = queries.double() * factor[..., None], keys.double() * scale[:, None]
    scores = torch.einsum("tmd,sd->tms", *exact).view(64, 2, -1, block_size).amax(-1)
    own = torch.arange(length - 64, length)[:, None] // block_size
    scores.masked_fill_((torch.arange(length // block_size) >= own)[:, None], float("-inf"))
    ranked, order = scores.sort(descending=True)
    clear = ranked[..., 0] - ranked[..., 1] > 1e-3
    want = torch.cat((order[..., :1], own[:, None].expand(-1, 2, -1)), -1).sort().values
    assert clear.float().mean() > 0.9
    assert torch.equal(got[clear], want[clear].int())


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_another_selection(kernel: str) -> None:
    """Of random scores most blocks stay, not all."""
    q, k = normal(64, 2, 64, seed=4), normal(LEN, 64, seed=5)
    got, full = run(kernel, q, k), run("cpu", q.float(), k.float(), fp8=False)
    same = (got[..., None] == full[..., None, :]).any(-1).float().mean()
    assert 0.9 < same < 1.0


def test_it_has_no_log_sum_exp() -> None:
    q, k = normal(4, 1, 16, seed=6), normal(LEN, 16, seed=7)
    with pytest.raises(ValueError, match="fp8=True: forms no log-sum-exp"):
        select_blocks(q, k, torch.tensor([0, LEN]), block_size=BLOCK, topk=TOPK, fp8=True, return_lse=True)
