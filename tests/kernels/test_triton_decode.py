"""Triton decoding against the definition, in the interpreter or on a GPU; resources on Hopper."""

from typing import Any

import pytest
import torch
from msa_kernels import DecodeCache, decode_attention, quantize_index_keys
from torch import Tensor

from tests.helpers.compare import worst_row
from tests.helpers.triton_env import (
    DTYPES,
    assert_fits_hopper,
    compiled_kernels,
    needs_triton,
    run_triton,
)

pytestmark = needs_triton
# query heads, KV groups, head dim, index head dim, block size, top-k, local blocks, page size (None: flat)
SHAPES = {
    "flat": (4, 2, 32, 16, 16, 4, 1, None),
    "small_pages": (6, 3, 20, 24, 16, 3, 2, 32),
    "odd_block": (4, 4, 16, 16, 48, 5, 1, 96),
    "many_heads": (32, 1, 64, 64, 128, 2, 1, 128),
}


def _decode(rows: list[Tensor], table: Tensor | None, *inputs: Tensor, **arguments: Any) -> Any:
    """Build the cache where the kernels run."""
    q, q_index, seq_lens = inputs
    return decode_attention(q, q_index, DecodeCache(*rows, page_table=table), seq_lens, **arguments)


def _launch(rows: list[Tensor], *inputs: Tensor, **arguments: Any) -> Any:
    """The launch itself, for arguments that `decode_attention` does not have."""
    from msa_kernels.decode.triton.launch import decode_attention_triton

    q, q_index, seq_lens = inputs
    return decode_attention_triton(q, q_index, DecodeCache(*rows), seq_lens, **arguments)


def _rows(
    shape: tuple[int, int, int, int], index_dim: int, lengths: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """Flat k, v, k_index with NaN past each length; index keys are small integers, with many ties."""
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, *shape, generator=generator).to(dtype)
    k_index = torch.randint(-2, 3, (*shape[:2], index_dim), generator=generator).to(dtype)
    for b, length in enumerate(lengths):
        for rows in (k, v, k_index):
            rows[b, length:] = float("nan")
    return [k, v, k_index]


def _queries(
    batch: int, heads: int, groups: int, dim: int, index_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(batch, heads, dim, generator=generator).to(dtype)
    return q, torch.randint(-2, 3, (batch, groups, index_dim), generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "index_dim", "block_size", "topk", "local_blocks", "page_size", "dtype"),
    [
        pytest.param(*shape, dtype, id=f"{name}-{dtype}")
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        # fp32 takes one head at a time, whatever their number
        if name != "many_heads" or dtype != torch.float32
    ],
)
def test_equals_definition(
    heads: int,
    groups: int,
    dim: int,
    index_dim: int,
    block_size: int,
    topk: int,
    local_blocks: int,
    page_size: int | None,
    dtype: torch.dtype,
) -> None:
    """The selection exactly; out and lse no worse than twice a torch run of the same dtype."""
    capacity = 256 if block_size == 128 else 192
    lengths = [capacity, 133, 1, 0]
    rows, table = _rows((4, capacity, groups, dim), index_dim, lengths, dtype), None
    q, q_index = _queries(4, heads, groups, dim, index_dim, dtype)
    if page_size is not None:
        table = torch.randperm(4 * capacity // page_size, generator=torch.Generator().manual_seed(3))
        rows = [part.reshape(-1, page_size, *part.shape[2:])[table.argsort()] for part in rows]
        table = table.view(4, -1).to(torch.int32)
    arguments: dict[str, Any] = {"block_size": block_size, "topk": topk, "local_blocks": local_blocks}
    inputs = (q, q_index, torch.tensor(lengths, dtype=torch.int32))
    out, lse, blocks = run_triton(_decode, rows, table, *inputs, kernel="triton", **arguments)
    same_dtype = _decode(rows, table, *inputs, kernel="cpu", **arguments)
    exact = [part.double() for part in rows]
    want_out, want_lse, want_blocks = _decode(
        exact, table, q.double(), q_index.double(), inputs[2], kernel="reference", **arguments
    )
    assert torch.equal(blocks, want_blocks)
    assert (out[3] == 0).all()
    assert (lse[3] == float("-inf")).all()
    # weights are rounded to the inputs' dtype before they meet v, once more than in the fp32 torch run
    eps = torch.finfo(dtype).eps
    assert worst_row(out[:3], want_out[:3]) <= 2 * worst_row(same_dtype[0][:3], want_out[:3]) + eps
    assert worst_row(lse[:3], want_lse[:3]) <= 2 * worst_row(same_dtype[1][:3], want_lse[:3]) + 1e-6


@pytest.mark.parametrize("num_parts", [1, 3])
def test_any_number_of_parts(num_parts: int) -> None:
    rows = _rows((2, 128, 2, 16), 16, [128, 77], torch.float32)
    inputs = (*_queries(2, 4, 2, 16, 16, torch.float32), torch.tensor([128, 77]))
    arguments: dict[str, Any] = {"block_size": 16, "topk": 5, "local_blocks": 1, "softmax_scale": 0.25}
    out, lse, blocks = run_triton(_launch, rows, *inputs, num_parts=num_parts, **arguments)
    want = _decode([part.double() for part in rows], None, *inputs, kernel="reference", **arguments)
    assert torch.equal(blocks, want[2])
    assert worst_row(out, want[0]) < 1e-6
    assert worst_row(lse, want[1]) < 1e-6


def _launch_candidate(number: int, *args: Any, **arguments: Any) -> Any:
    """The shipped configuration or one to be timed, with few programs; blocks per program at 1M tokens."""
    from msa_kernels.decode.configs import CANDIDATES, MAIN
    from msa_kernels.decode.triton import launch

    config = (MAIN, *CANDIDATES)[number]
    at_1m = launch._blocks_per_program(config, 8192)
    before, launch._WANTED_PROGRAMS = launch._WANTED_PROGRAMS, 1
    try:
        return at_1m, *_launch(*args, config=config, **arguments)
    finally:
        launch._WANTED_PROGRAMS = before


@pytest.mark.parametrize(("number", "per_program"), [(0, 32), (1, 4)])
def test_candidates(number: int, per_program: int) -> None:
    """Several blocks per program, the last one's partly not there."""
    rows = _rows((2, 640, 2, 16), 16, [640, 77], torch.float32)
    inputs = (*_queries(2, 4, 2, 16, 16, torch.float32), torch.tensor([640, 77]))
    arguments: dict[str, Any] = {"block_size": 16, "topk": 5, "local_blocks": 1, "softmax_scale": 0.25}
    at_1m, out, _, blocks = run_triton(_launch_candidate, number, rows, *inputs, **arguments)
    want = _decode([part.double() for part in rows], None, *inputs, kernel="reference", **arguments)
    assert at_1m == per_program
    assert torch.equal(blocks, want[2])
    assert worst_row(out, want[0]) < 1e-6


def _decode_fp8(
    rows: list[Tensor], table: Tensor | None, *inputs: Tensor, native: bool, **arguments: Any
) -> Any:
    """With index keys in fp8, converted by the device or from their bits."""
    from msa_kernels.decode.triton import launch

    q, q_index, seq_lens = inputs
    keys, scale = quantize_index_keys(rows[2])
    cache = DecodeCache(rows[0], rows[1], keys, page_table=table, k_index_scale=scale)
    before, launch._converts_fp8 = launch._converts_fp8, lambda device: native
    try:
        return decode_attention(q, q_index, cache, seq_lens, **arguments)
    finally:
        launch._converts_fp8 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["converted", "from_bits"])
@pytest.mark.parametrize("page_size", [None, 48], ids=["flat", "paged"])
def test_fp8_index_keys(page_size: int | None, native: bool, dtype: torch.dtype) -> None:
    """Keys with every bit pattern of fp8, scales from token to token; NaN past the length is not read."""
    lengths = [192, 100]
    rows, table = _rows((2, 192, 2, 16), 32, lengths, dtype), None
    rows[2][0] = torch.randn(192, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    rows[2][0, :8] = every[every.isfinite()].repeat(2)[:256].view(8, 32).to(dtype) / 16
    rows[2][0, 8:16] *= 0.01
    if page_size is not None:
        table = torch.tensor([[3, 1, 0, 2], [7, 5, 6, 4]], dtype=torch.int32)
        order = table.flatten().long().argsort()
        rows = [part.reshape(8, page_size, *part.shape[2:])[order] for part in rows]
    q, q_index = _queries(2, 4, 2, 16, 32, dtype)
    inputs = (q, q_index, torch.tensor(lengths, dtype=torch.int32))
    arguments: dict[str, Any] = {"block_size": 16, "topk": 4}
    got = run_triton(_decode_fp8, rows, table, *inputs, native=native, kernel="triton", **arguments)
    want = _decode_fp8(rows, table, *inputs, native=native, kernel="reference", **arguments)
    assert torch.equal(got[2], want[2])
    assert worst_row(got[0], want[0]) <= 4 * torch.finfo(dtype).eps


def _decode_ranking_few(*args: Any, **arguments: Any) -> Any:
    """`_decode` with programs that rank 32 candidates at most."""
    from msa_kernels.decode.triton import launch

    before, launch._MAX_CANDIDATES = launch._MAX_CANDIDATES, 32
    try:
        return _decode(*args, **arguments)
    finally:
        launch._MAX_CANDIDATES = before


def test_best_of_very_many_blocks() -> None:
    """More blocks than one program ranks: the best of each chunk, of those again, and then of the rest."""
    rows = _rows((1, 150, 1, 16), 16, [150], torch.float32)
    inputs = (*_queries(1, 1, 1, 16, 16, torch.float32), torch.tensor([150]))
    arguments: dict[str, Any] = {"block_size": 1, "topk": 6}
    blocks = run_triton(_decode_ranking_few, rows, None, *inputs, kernel="triton", **arguments)[2]
    assert torch.equal(blocks, _decode(rows, None, *inputs, kernel="reference", **arguments)[2])


def _launch_shipped(shapes: list[tuple[int, int, int, str]], fp8: list[bool | None]) -> None:
    """Launch each (both head dims, block size, top-k, dtype); cut in parts, paged, many candidates.

    fp8: for each shape, None for index keys in its dtype, True and False for conversion and bits of fp8.
    """
    from msa_kernels.decode.triton import launch

    for (dim, block_size, topk, dtype_name), native in zip(shapes, fp8, strict=True):
        dtype = getattr(torch, dtype_name)
        k, k_index = torch.zeros(8, 1024, 4, dim, dtype=dtype), torch.zeros(8, 1024, dim, dtype=dtype)
        # one page many times: addresses are not looked at
        table = torch.zeros(2, 1100, dtype=torch.int32)
        scale = None
        if native is not None:
            k_index, scale = quantize_index_keys(k_index)
            launch._converts_fp8 = [lambda _: False, lambda _: True][native]
        launch.decode_attention_triton(
            torch.zeros(2, 64, dim, dtype=dtype),
            torch.zeros(2, 4, dim, dtype=dtype),
            DecodeCache(k, k, k_index, page_table=table, k_index_scale=scale),
            torch.zeros(2, dtype=torch.int32),
            block_size=block_size,
            topk=topk,
            local_blocks=1,
            softmax_scale=0.1,
        )


def test_compiles_for_hopper() -> None:
    """fp8 from its bits, which a Hopper GPU has no need of, in M3's shape only."""
    kernels = compiled_kernels(
        _launch_shipped,
        [(128, 128, 16, "bfloat16")] * 3 + [(256, 256, 64, "float16")] * 2 + [(128, 128, 16, "float32")] * 2,
        [None, True, False, None, True, None, True],
    )
    assert_fits_hopper(kernels)
    scoring = [kernel for kernel in kernels if kernel.name == "decode_scores_kernel"]
    assert len(scoring) == 7
    for kernel in scoring:
        # the device's own conversion of two values at a time
        assert ("cvt.rn.f16x2.e4m3x2" in kernel.ptx) == bool(kernel.constants["NATIVE_FP8"])
    names = {kernel.name for kernel in kernels}
    assert {"decode_scores_kernel", "decode_attention_kernel", "merge_parts_kernel", "merge_kernel"} <= names
