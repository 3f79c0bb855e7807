"""Triton block selection: equal to the definition, ties included, and within a Hopper GPU's resources."""

import os
from typing import Any

import pytest
import torch
from msa_kernels import select_blocks
from msa_kernels.select_blocks.lse import selected_lse
from msa_kernels.select_blocks.reference import select_blocks_reference
from msa_kernels.select_blocks.types import SelectionArgs
from torch import Tensor

from tests.helpers.triton_env import (
    DTYPES,
    assert_fits_hopper,
    compiled_kernels,
    needs_triton,
    run_triton,
)

pytestmark = needs_triton
EVERY_SHAPE = bool(os.environ.get("MSA_KERNELS_COMPILE_ALL"))


def _launch(*args: Any, **kwargs: Any) -> Tensor:
    """Block ids of the launch itself, which has more arguments than `select_blocks`; runs in the worker."""
    return _launch_with_lse(*args, **kwargs)[0]


def _launch_with_lse(
    *tensors: Tensor,
    config: tuple[Any, ...] | None = None,
    num_splits: int | None = None,
    lse_scale: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    from msa_kernels.select_blocks.configs import SelectConfig
    from msa_kernels.select_blocks.triton.launch import select_blocks_triton

    args = SelectionArgs(*tensors, **kwargs, return_lse=lse_scale is not None, index_scale=lse_scale)
    tiles = None if config is None else SelectConfig(*config)
    return select_blocks_triton(args, config=tiles, num_splits=num_splits)


def _small_integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Products and sums of these are exact in every dtype, and equal scores are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_kv_heads", "dim", "block_size", "topk", "local_blocks", "cu_seqlens"),
    [
        (4, 16, 16, 4, 1, [0, 512]),
        (3, 24, 16, 3, 2, [0, 64, 80, 160, 400, 448]),
        (1, 32, 32, 1, 1, [0, 512]),
        (2, 20, 48, 5, 5, [0, 240, 480]),
        (4, 32, 128, 2, 1, [0, 512]),
    ],
    ids=["m3_heads", "documents", "only_local", "odd_block", "m3_block"],
)
def test_equals_definition(
    dtype: torch.dtype,
    num_kv_heads: int,
    dim: int,
    block_size: int,
    topk: int,
    local_blocks: int,
    cu_seqlens: list[int],
) -> None:
    """Queries from the middle of a block to the end, some of them padding."""
    seq_len, offset = cu_seqlens[-1], cu_seqlens[-1] - 70
    q = _small_integers((70, num_kv_heads, dim), dtype, 1)
    k = _small_integers((seq_len, dim), dtype, 2)
    valid = torch.rand(70, generator=torch.Generator().manual_seed(3)) > 0.1
    arguments: dict[str, Any] = {
        "block_size": block_size,
        "topk": topk,
        "local_blocks": local_blocks,
        "query_offset": offset,
        "query_valid": valid,
    }
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    got = run_triton(select_blocks, q, k, starts, kernel="triton", **arguments)
    want = select_blocks_reference(SelectionArgs(q, k, starts, **arguments))[0]
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


@pytest.mark.parametrize("kernel", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_selects_blocks_that_exist(value: float, kernel: str) -> None:
    """Others are asked for these blocks before the step is found to be bad."""
    q, k = _small_integers((64, 2, 16), torch.float32, 6), _small_integers((256, 16), torch.float32, 7)
    q[3::7, 1], k[20:180:3] = value, value
    arguments: dict[str, Any] = {"block_size": 16, "topk": 3, "query_offset": 192, "kernel": kernel}
    ids = run_triton(select_blocks, q, k, torch.tensor([0, 128, 256]), **arguments)
    own = (torch.arange(192, 256) // 16)[:, None, None]
    assert ((ids == -1) | ((ids >= 8) & (ids <= own))).all()
    assert ((ids[..., 1:] != ids[..., :-1]) | (ids[..., 1:] == -1)).all(), "none twice"


@pytest.mark.parametrize("num_splits", [1, 3], ids=["whole_range", "three_parts"])
def test_ties_go_to_the_lower_block(num_splits: int) -> None:
    """All scores equal: the first blocks win, also where they come from different programs."""
    q, k = torch.ones(96, 2, 16), torch.ones(256, 16)
    starts = torch.tensor([0, 256])
    arguments: dict[str, Any] = {"block_size": 16, "topk": 5, "query_offset": 160}
    got = run_triton(_launch, q, k, starts, num_splits=num_splits, **arguments)
    assert got[95].tolist() == [[0, 1, 2, 3, 15]] * 2
    assert torch.equal(got, select_blocks_reference(SelectionArgs(q, k, starts, **arguments))[0])


@pytest.mark.parametrize("num_splits", [1, 4], ids=["whole_range", "four_parts"])
def test_scattered_positions_and_strided_inputs(num_splits: int) -> None:
    """A tile's queries lie in documents far apart; queries and keys are slices of wider rows."""
    every = _small_integers((512, 2, 40), torch.float16, 4)[..., :16]
    k = _small_integers((512, 40), torch.float16, 5)[:, 8:24]
    position = torch.tensor([0, 7, 100, 127, 128, 129, 383, 384, 400, 511])
    starts = torch.tensor([0, 128, 144, 384, 512])
    got = run_triton(
        _launch, every[position], k, starts, block_size=16, topk=4, position=position, num_splits=num_splits
    )
    want = select_blocks_reference(SelectionArgs(every, k, starts, block_size=16, topk=4))[0]
    assert torch.equal(got, want[position])


@pytest.mark.parametrize(
    "config",
    [(128, 128, 4, 2), (128, 64, 4, 2, 256, True), (64, 32, 4, 2, 16, True)],
    ids=["insert_always", "test_first", "channels_in_chunks"],
)
def test_configurations_select_alike(config: tuple[Any, ...]) -> None:
    """Several blocks per tile, the last tile of a range partly beyond it; top-k above their number."""
    q, k = _small_integers((48, 3, 64), torch.float32, 6), _small_integers((208, 64), torch.float32, 7)
    starts = torch.tensor([0, 48, 208])
    arguments: dict[str, Any] = {"block_size": 16, "topk": 9, "local_blocks": 2, "query_offset": 150}
    got = run_triton(_launch, q, k, starts, config=config, num_splits=1, **arguments)
    assert torch.equal(got, select_blocks_reference(SelectionArgs(q, k, starts, **arguments))[0])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("config", "block_size", "local_blocks", "num_splits", "cu_seqlens", "position"),
    [
        ((64, 16, 4, 4), 32, 1, 1, [0, 480], None),
        ((64, 16, 4, 2), 32, 2, 3, [0, 64, 96, 480], None),
        (
            (32, 16, 4, 2, 256, True),
            32,
            1,
            1,
            [0, 96, 160, 384, 480],
            [0, 31, 95, 96, 159, 160, 383, 385, 479],
        ),
        ((32, 16, 4, 2, 256, True), 64, 1, 2, [0, 128, 192, 448], [0, 127, 128, 191, 192, 300, 447]),
        ((64, 16, 4, 2, 16), 48, 2, 1, [0, 96, 480], None),
    ],
    ids=["halves", "documents_in_parts", "scattered", "quarters_in_parts", "thirds_channels_in_chunks"],
)
def test_parts_of_blocks_select_alike(
    dtype: torch.dtype,
    config: tuple[Any, ...],
    block_size: int,
    local_blocks: int,
    num_splits: int,
    cu_seqlens: list[int],
    position: list[int] | None,
) -> None:
    """Tiles of keys smaller than a block: its best token may lie in any of them. Ties, padding queries."""
    where = torch.arange(cu_seqlens[-1])[-75:] if position is None else torch.tensor(position)
    q = _small_integers((len(where), 3, 32), dtype, 9)
    k, starts = _small_integers((cu_seqlens[-1], 32), dtype, 10), torch.tensor(cu_seqlens)
    valid = torch.rand(len(where), generator=torch.Generator().manual_seed(12)) > 0.1
    arguments: dict[str, Any] = {"block_size": block_size, "topk": 5, "local_blocks": local_blocks}
    arguments |= {"position": where, "query_valid": valid}
    got = run_triton(_launch, q, k, starts, config=config, num_splits=num_splits, **arguments)
    assert torch.equal(got, select_blocks_reference(SelectionArgs(q, k, starts, **arguments))[0])


@pytest.mark.parametrize("num_splits", [8, 16])
def test_many_parts_of_a_range(num_splits: int) -> None:
    """As many candidates per row as a long divided range has; of a short row, the last parts are empty."""
    q, k = _small_integers((3, 2, 16), torch.float32, 13), _small_integers((1024, 16), torch.float32, 14)
    # so that not all good scores are equal
    k[:, 0] = torch.linspace(-1, 1, 1024).mul(16).round() / 16
    position, starts = torch.tensor([20, 500, 1023]), torch.tensor([0, 1024])
    arguments: dict[str, Any] = {"block_size": 2, "topk": 16, "position": position}
    got = run_triton(_launch, q, k, starts, num_splits=num_splits, config=(16, 32, 4, 2), **arguments)
    assert torch.equal(got, select_blocks(q, k, starts, kernel="cpu", **arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_scores(dtype: torch.dtype) -> None:
    """Where last chosen and first refused score are apart by more than rounding, the ids are equal."""
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(64, 4, 32, generator=generator).to(dtype)
    k = torch.randn(512, 32, generator=generator).to(dtype)
    got = run_triton(_launch, q, k, torch.tensor([0, 512]), block_size=16, topk=4, query_offset=448)
    blocks = (q.double() @ k.double().T).view(64, 4, 32, 16).amax(-1)
    own = torch.arange(448, 512)[:, None] // 16
    blocks.masked_fill_((torch.arange(32) >= own)[:, None], float("-inf"))
    ranked, order = blocks.sort(descending=True)
    clear = ranked[..., 2] - ranked[..., 3] > 1e-4
    want = torch.cat((order[..., :3], own[:, None].expand(-1, 4, -1)), -1).sort().values
    assert clear.float().mean() > 0.9
    assert torch.equal(got[clear], want[clear].int())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("config", "num_splits", "block_size", "local_blocks", "position"),
    [
        (None, 1, 16, 1, None),
        (None, 3, 16, 2, None),
        ((128, 64, 4, 2), 1, 16, 1, None),
        ((64, 64, 4, 2, 16), 2, 16, 3, [0, 7, 47, 48, 95, 96, 97, 200, 383]),
        ((64, 32, 4, 2), 1, 48, 1, [0, 30, 47, 48, 240, 383]),
        ((64, 16, 4, 2), 1, 48, 1, None),
    ],
    ids=["default", "three_parts", "tiles_of_blocks", "scattered", "odd_block", "parts_of_blocks"],
)
def test_lse_of_selected_tokens(
    dtype: torch.dtype,
    config: tuple[Any, ...] | None,
    num_splits: int,
    block_size: int,
    local_blocks: int,
    position: list[int] | None,
) -> None:
    """The selection stays as it is without; the worst query no worse than twice a torch run of this dtype."""
    generator = torch.Generator().manual_seed(11)
    every = (2 * torch.randn(384, 3, 32, generator=generator)).to(dtype)
    k = (2 * torch.randn(384, 32, generator=generator)).to(dtype)
    starts = torch.tensor([0, 48, 96, 384])
    where = torch.arange(76, 116) if position is None else torch.tensor(position)
    q, valid = every[where], torch.rand(len(where), generator=generator) > 0.1
    shape: dict[str, Any] = {"block_size": block_size, "topk": 5, "local_blocks": local_blocks}
    shape |= {"position": where, "query_valid": valid}
    options: dict[str, Any] = {"num_splits": num_splits}
    if config is not None:
        options["config"] = config
    blocks, lse = run_triton(_launch_with_lse, q, k, starts, **shape, **options, lse_scale=0.3)
    assert torch.equal(blocks, run_triton(_launch, q, k, starts, **shape, **options))
    cpu = {"block_size": block_size, "scale": 0.3}
    want = selected_lse(q.double(), k.double(), blocks, where, **cpu)
    same_dtype = selected_lse(q, k, blocks, where, **cpu)
    assert lse.dtype == torch.float32
    assert (lse[~valid] == float("-inf")).all()
    error, limit = (float((x[valid] - want[valid]).abs().max()) for x in (lse, same_dtype))
    assert error <= 2 * limit + 1e-6


def test_no_queries() -> None:
    q, k = torch.zeros(0, 2, 16), torch.zeros(32, 16)
    assert run_triton(_launch, q, k, torch.tensor([0, 32]), block_size=16, topk=3).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "fast"}, "kernel=fast"),
        ({"kernel": "triton", "topk": 65}, "topk=65"),
        ({"kernel": "triton", "q_index": torch.zeros(16, 2, 4, dtype=torch.float64)}, "float64"),
        (
            {
                "kernel": "triton",
                "block_size": 320,
                "k_index": torch.zeros(640, 4),
                "cu_seqlens": torch.tensor([0, 640]),
            },
            "block_size=320",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "q_index": torch.zeros(16, 2, 4),
        "k_index": torch.zeros(16, 4),
        "cu_seqlens": torch.tensor([0, 16]),
        "block_size": 16,
        "topk": 2,
    }
    with pytest.raises(ValueError, match=words):
        run_triton(select_blocks, **(arguments | change))


def _launch_shipped(shapes: list[tuple[int, int, int, str]], lse_scale: float | None) -> None:
    """Launch each (index head dim, block size, top-k, dtype), M3's with every configuration for it."""
    from msa_kernels.select_blocks.configs import CANDIDATES, MAIN, WHOLE
    from msa_kernels.select_blocks.triton.launch import select_blocks_triton

    for dim, block_size, topk, dtype_name in shapes:
        dtype = getattr(torch, dtype_name)
        q, k = torch.zeros(1024, 4, dim, dtype=dtype), torch.zeros(8192, dim, dtype=dtype)
        is_m3 = (dim, block_size, topk, dtype) == (128, 128, 16, torch.bfloat16)
        # with the log-sum-exp blocks are not divided
        whole = (WHOLE, *MAIN[1:])
        configs = whole if lse_scale is not None else (*MAIN, *CANDIDATES)
        for config in configs if is_m3 else [None]:
            args = SelectionArgs(
                q, k, torch.tensor([0, 8192]), block_size=block_size, topk=topk,
                return_lse=lse_scale is not None, index_scale=lse_scale,
            )  # fmt: skip
            select_blocks_triton(args, config=config, num_splits=2 if config is configs[0] else 1)


@pytest.mark.parametrize("lse_scale", [None, 0.1], ids=["ids", "ids_and_lse"])
def test_compiles_for_hopper(lse_scale: float | None) -> None:
    """No spills; M3's shape on Hopper's own matrix instructions, with room for two programs of 4 warps.

    MSA_KERNELS_COMPILE_ALL=1: all shapes with the log-sum-exp too.
    """
    shapes = [(128, 128, 16, "bfloat16"), (128, 128, 16, "float32")]
    if lse_scale is None or EVERY_SHAPE:
        shapes += [(128, 64, 64, "bfloat16"), (256, 256, 16, "bfloat16"), (64, 16, 16, "float16")]
    kernels = compiled_kernels(_launch_shipped, shapes, lse_scale)
    assert_fits_hopper(kernels)
    scoring = [kernel for kernel in kernels if kernel.name == "select_blocks_kernel"]
    m3 = [kernel for kernel in scoring if kernel.constants["B"] == 128 and kernel.constants["CHUNK"] == 128]
    assert len(m3) == (7 if lse_scale is None else 3)
    for kernel in m3:
        assert "wgmma.mma_async" in kernel.ptx
        assert "cp.async.bulk.tensor" in kernel.ptx
        print(
            f"{kernel.constants['ROWS']} x {kernel.constants['KEYS']}, {kernel.num_warps} warps, "
            f"{kernel.constants['STAGES']} stages: {kernel.registers} registers, {kernel.shared_bytes} B"
        )
        if kernel.constants["STAGES"] != 3:
            assert 2 * (kernel.shared_bytes + 1024) <= 233472
            assert 2 * 32 * kernel.num_warps * kernel.registers <= 65536


def _launch_packs(cases: list[tuple[int, int, int]]) -> None:
    """Launch for packs of so many queries and documents, keys shared by so many programs."""
    from msa_kernels.select_blocks.triton.launch import select_blocks_triton

    for queries, documents, num_splits in cases:
        q = torch.zeros(queries, 4, 16, dtype=torch.bfloat16)
        k = torch.zeros(2048, 16, dtype=torch.bfloat16)
        args = SelectionArgs(
            q, k, torch.arange(documents + 1) * 64, block_size=128, topk=16, position=torch.arange(queries)
        )
        select_blocks_triton(args, num_splits=num_splits)


def test_any_number_of_documents_and_queries_compiles_nothing_anew() -> None:
    """Both change from step to step: packs differ, and so do the queries whose recall is measured."""
    first, others = (
        [(512, 1, 1), (512, 1, 2)],
        [(512, 2, 1), (512, 16, 1), (500, 3, 1), (37, 3, 2), (1, 16, 2)],
    )
    want = sorted(kernel.name for kernel in compiled_kernels(_launch_packs, first))
    assert sorted(kernel.name for kernel in compiled_kernels(_launch_packs, first + others)) == want
