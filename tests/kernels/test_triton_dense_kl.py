"""Triton's dense KL loss against the definition in fp64, interpreted or on a GPU; resources on Hopper."""

import os
from typing import Any

import pytest
import torch
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from tests.helpers.compare import worst_row
from tests.helpers.triton_env import (
    DTYPES,
    assert_fits_hopper,
    compiled_kernels,
    needs_triton,
    run_triton,
)
from tests.kernels.test_dense_kl import by_parts

pytestmark = needs_triton
# tokens, where the causal part begins, KV groups, heads per group, head dim, index head dim
SHAPES = {
    "one_part": (140, 0, 2, 3, 16, 24),
    "two_parts": (110, 70, 1, 2, 20, 16),
    "one_token": (1, 0, 2, 1, 32, 8),
}


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q [T, M, G, D], k [T, M, D], q_index [T, M, Di], k_index [T, Di], rounded to dtype."""
    tokens, _, groups, heads, dim, index_dim = shape
    generator = torch.Generator().manual_seed(1)
    sizes = (
        (tokens, groups, heads, dim), (tokens, groups, dim), (tokens, groups, index_dim), (tokens, index_dim),
    )  # fmt: skip
    return [(2 * torch.randn(size, generator=generator)).to(dtype) for size in sizes]


def _in_small_portions(*args: Any, portion_bytes: int, own_tiles: bool, **kwargs: Any) -> Any:
    """`by_parts` with differences of few queries at a time; new buffers hold NaN; runs in the worker.

    own_tiles: 32 queries by 64 keys for all, so that several are partly filled and partly seen.
    """
    from msa_kernels.dense_kl import configs
    from msa_kernels.dense_kl.triton import launch

    before = configs.LSE, configs.DIFFERENCE, launch.DIFFERENCE_BYTES
    launch.DIFFERENCE_BYTES = portion_bytes
    if own_tiles:
        configs.LSE = configs.DIFFERENCE = (configs.DenseConfig(256, 4, 32, 64, 4, 1),)
    torch.use_deterministic_algorithms(True)
    try:
        return by_parts(*args, **kwargs)
    finally:
        torch.use_deterministic_algorithms(False)
        configs.LSE, configs.DIFFERENCE, launch.DIFFERENCE_BYTES = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "portion_bytes", "own_tiles"),
    [("one_part", 1, True), ("two_parts", 2**20, True), ("two_parts", 2**20, False), ("one_token", 1, True)],
    ids=["portions", "parts", "shipped_tiles", "one_token"],
)
def test_value_and_gradients(name: str, portion_bytes: int, own_tiles: bool, dtype: torch.dtype) -> None:
    """Worst rows no worse than twice a torch run of the same dtype, up to a rounding of the differences."""
    shape = SHAPES[name]
    inputs = _draw(shape, dtype)
    settings: dict[str, Any] = {"first": shape[1], "scale": shape[4] ** -0.5, "index_scale": 0.4}
    limits = {"portion_bytes": portion_bytes, "own_tiles": own_tiles}
    got = run_triton(_in_small_portions, *inputs, **settings, **limits, kernel="triton")
    want = by_parts(*(x.double() for x in inputs), **settings, kernel="reference")
    same_dtype = by_parts(*inputs, **settings, kernel="cpu")
    assert got[0].dtype == got[1].dtype == torch.float32
    for grad, exact, plain in zip(got[:2], want[:2], same_dtype[:2], strict=True):
        if name == "one_token":
            assert float(grad.abs().max()) < 1e-3
        else:
            # differences meet keys and queries in the inputs' dtype
            assert worst_row(grad, exact) <= 2 * worst_row(plain, exact) + torch.finfo(dtype).eps
    assert abs(float(got[2] - want[2])) <= 2e-6 * max(float(want[2]), 1.0)
    alone = run_triton(_in_small_portions, *inputs, **settings, **limits, with_value=False, kernel="triton")
    assert torch.equal(alone[0], got[0])
    assert torch.equal(alone[1], got[1])
    assert float(alone[2]) == -1.0


def _launch_shipped(shapes: list[tuple[int, int, int, str]]) -> None:
    """Launch each (heads per group, head dim, index head dim, dtype), causal; bf16 not causal too."""
    for heads, dim, index_dim, dtype_name in shapes:
        dtype = getattr(torch, dtype_name)
        # as in training: views of [tokens, groups, heads, channels]
        q = torch.zeros(512, 4, heads, dim, dtype=dtype).permute(1, 2, 0, 3)
        k = torch.zeros(512, 4, dim, dtype=dtype).transpose(0, 1)
        q_index = torch.zeros(512, 4, index_dim, dtype=dtype).transpose(0, 1)
        k_index = torch.zeros(512, index_dim, dtype=dtype)
        lse = torch.zeros(4, heads, 512)
        for causal in (False, True) if dtype_name == "bfloat16" else (True,):
            lse_part(q, k, causal=causal, softmax_scale=0.1, kernel="triton")
            dense_kl_part(
                q, k, lse, q_index, k_index, lse[:, 0],
                causal=causal, softmax_scale=0.1, index_scale=0.1, kernel="triton",
            )  # fmt: skip


def _compiled(shapes: list[tuple[int, int, int, str]]) -> None:
    """`_launch_shipped` where tensors lie on the CPU and kernels are compiled only."""
    from msa_kernels.dense_kl import op

    choose, op.choose_kernel = op.choose_kernel, lambda *_: "triton"
    try:
        _launch_shipped(shapes)
    finally:
        op.choose_kernel = choose


def test_compiles_for_hopper() -> None:
    """No spills; M3's shape on Hopper's own matrix instructions.

    MSA_KERNELS_COMPILE_ALL=1: the other entries of the tables too.
    """
    shapes = [(16, 128, 128, "bfloat16")]
    if os.environ.get("MSA_KERNELS_COMPILE_ALL"):
        shapes += [(16, 256, 256, "float16"), (16, 128, 128, "float32"), (4, 256, 256, "float32")]
    kernels = compiled_kernels(_compiled, shapes)
    assert_fits_hopper(kernels)
    names = {kernel.name for kernel in kernels}
    assert names == {"lse_kernel", "difference_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    m3 = [k for k in kernels if k.constants.get("DP", k.constants.get("DIP")) == 128 and ".bf16" in k.ptx]
    assert len(m3) >= 7
    assert all("wgmma.mma_async" in kernel.ptx for kernel in m3)


def _launch_parts(parts: list[tuple[int, int, bool]]) -> None:
    """Launch everything for parts of documents: queries, keys, causal."""
    from msa_kernels.dense_kl.triton import launch

    scales = {"softmax_scale": 0.1, "index_scale": 0.1}
    for queries, keys, causal in parts:
        q = torch.zeros(2, 2, 256, 16, dtype=torch.bfloat16)[:, :, :queries]
        k = torch.zeros(2, 256, 16, dtype=torch.bfloat16)[:, :keys]
        q_index = torch.zeros(2, 256, 16, dtype=torch.bfloat16)[:, :queries]
        k_index = torch.zeros(256, 16, dtype=torch.bfloat16)[:keys]
        lse = launch.lse_part(q, k, causal=causal, softmax_scale=0.1)
        launch.dense_kl_part(q, k, lse, q_index, k_index, lse[:, 0], causal=causal, **scales)


def test_documents_of_any_length_compile_nothing_anew() -> None:
    """They begin and end anywhere, on each rank at others: a rank that compiles keeps all waiting."""
    whole = [(256, 256, True), (256, 128, False)]
    odd = [
        (101, 101, True),
        (101, 55, False),
        (128, 55, False),
        (101, 128, False),
        (1, 1, True),
        (7, 1, False),
    ]
    want = sorted(kernel.name for kernel in compiled_kernels(_launch_parts, whole))
    assert sorted(kernel.name for kernel in compiled_kernels(_launch_parts, whole + odd)) == want
