"""Block-sparse attention by Triton kernels against the plain definition in fp64."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.choice import unsupported
from msa_kernels.block_sparse_attention.tiled import pool_forward
from msa_kernels.block_sparse_attention.triton.schedule import build_schedule, queries_per_portion
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, PoolOutput
from msa_kernels.block_sparse_attention.work_list import build_work_list
from torch import Tensor

from tests.helpers.compare import assert_rows_close
from tests.helpers.pool_problems import (
    PoolProblem,
    Shape,
    assert_equal_without_value,
    attend,
    attend_backward,
    make_problem,
    to_dtype,
)
from tests.helpers.triton_env import (
    DTYPES,
    HAS_GPU,
    assert_fits_hopper,
    compiled_kernels,
    needs_triton,
    run_triton,
)

# Relative to the largest value. Partial results of 16-bit runs are rounded per block before they are added.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = {
    "plain": Shape(),
    # Split lists, portions of few queries, and gradients of blocks that grow from portion to portion.
    "pools_temperature_portions": Shape(
        num_pools=3, temperature=2.0, part_bytes=2**13, pairs_per_item=8, split_bytes=2**15, seed=1
    ),
    "odd_sizes": Shape(heads=3, dim=20, index_dim=24, block_size=24, seq_len=72, starts=(0, 72)),
    "window": Shape(window=21, topk=4),
    # The backward takes such blocks in parts, the last one half full.
    "block_in_parts": Shape(block_size=48, seq_len=96, starts=(0, 96), groups=1),
    # The gradients of K and V in launches of their own.
    "separate": Shape(dim=130, heads=1, groups=1, num_queries=20, starts=(0, 64), temperature=1.5),
    "no_index": Shape(with_index=False, heads=16, groups=1, dim=64, block_size=32, starts=(0, 64)),
}
CANDIDATES = [
    (table, number)
    for table in ("ATTEND_BACKWARD", "KL_BACKWARD")
    for number in range(len(getattr(configs, f"{table}_CANDIDATES")))
]
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [(name, dtype) for name in ("plain", "separate") for dtype in DTYPES[1:]]


@contextmanager
def nan_filled_buffers() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN, so that a result nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def limits(shape: Shape) -> Iterator[None]:
    """Portions and items as small as the shape asks for."""
    from msa_kernels.block_sparse_attention.triton import launch_backward
    from msa_kernels.block_sparse_attention.triton import launch_forward as launch

    with pytest.MonkeyPatch.context() as patch:
        if shape.part_bytes:
            patch.setattr(launch, "FORWARD_PART_BYTES", shape.part_bytes)
            patch.setattr(launch_backward, "BACKWARD_PART_BYTES", 3 * shape.part_bytes)
        if shape.pairs_per_item:
            patch.setattr(launch, "FORWARD_PAIRS_PER_ITEM", shape.pairs_per_item)
            patch.setattr(launch_backward, "BACKWARD_PAIRS_PER_ITEM", shape.pairs_per_item)
        if shape.split_bytes:
            patch.setattr(launch_backward, "SPLIT_BYTES", shape.split_bytes)
        yield


def run_pools(problem: PoolProblem, shape: Shape) -> tuple[PoolOutput, list[PoolGrads]]:
    """In the place where kernels run."""
    with nan_filled_buffers(), limits(shape):
        merged = attend(problem, "triton")
        return merged, attend_backward(problem, merged, "triton")


def assert_outputs_equal(got: PoolOutput, want: PoolOutput, dtype: torch.dtype) -> None:
    """Fail unless outputs of kernels in this dtype are those of the definition."""
    for field in dataclasses.fields(PoolOutput):
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert (a is None) == (b is None), field.name
        if a is None:
            continue
        seen = torch.isfinite(b)
        # Padding queries select nothing.
        assert not seen.all() or field.name == "out"
        assert torch.equal(a[~seen], b[~seen].to(a.dtype)), field.name
        tolerance = TOLERANCE[dtype] if field.name == "out" else TOLERANCE[torch.float32]
        assert_rows_close(a.masked_fill(~seen, 0.0), b.masked_fill(~seen, 0.0), tolerance)


@needs_triton
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equals_the_definition(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    problem = make_problem(shape, dtype)
    got, got_grads = run_triton(run_pools, problem, shape)
    exact = to_dtype(problem, torch.float64)
    want = attend(exact, "reference")
    assert_outputs_equal(got, want, dtype)
    for block_table, ours, theirs in zip(
        problem.block_tables, got_grads, attend_backward(exact, want, "reference"), strict=True
    ):
        for field in dataclasses.fields(PoolGrads):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert (a is None) == (b is None), field.name
            if a is not None:
                assert_rows_close(a, b, TOLERANCE[dtype])
        unread = torch.ones(ours.dkv.shape[0], dtype=torch.bool)
        unread[block_table[block_table >= 0]] = False
        assert not ours.dkv[unread].any()
        assert ours.dk_index is None or not ours.dk_index[unread].any()


@needs_triton
@pytest.mark.parametrize("name", ["pools_temperature_portions", "block_in_parts"])
def test_gradients_do_not_need_the_value(name: str) -> None:
    """To the bit; the value is not formed."""
    problem = make_problem(SHAPES[name], torch.float32)
    _, want = run_triton(run_pools, problem, SHAPES[name])
    _, got = run_triton(run_pools, dataclasses.replace(problem, with_kl_value=False), SHAPES[name])
    assert_equal_without_value(got, want)


@needs_triton
def test_nan_reaches_the_value() -> None:
    """By it a run sees that its index branch is spoilt."""
    problem = make_problem(SHAPES["plain"], torch.float32)
    assert problem.queries.q_index is not None
    problem.queries.q_index[7, 1, 3] = float("nan")
    _, (grads,) = run_triton(run_pools, problem, SHAPES["plain"])
    assert grads.kl.isnan()


@needs_triton
@pytest.mark.parametrize("num_queries", [0, 5])
def test_empty(num_queries: int) -> None:
    """No query, or a pool without blocks, or one whose blocks nobody reads."""
    problem = make_problem(Shape(num_queries=num_queries), torch.float32)
    problem.block_tables = [block_table.fill_(-1) for block_table in problem.block_tables]
    empty = BlockPool(kv=problem.pools[0].kv[:0], block=problem.pools[0].block[:0])
    problem.pools.append(empty)
    problem.block_tables.append(problem.block_tables[0])
    merged, grads = run_triton(run_pools, problem, Shape())
    assert not merged.out.any()
    assert torch.isinf(merged.lse).all()
    assert torch.isinf(merged.lse_index).all()
    for part, pool in zip(grads, problem.pools, strict=True):
        assert part.dkv.shape == pool.kv.shape
        for tensor in (part.dq, part.dkv, part.dq_index, part.dk_index, part.kl):
            assert not tensor.any()


@needs_triton
@pytest.mark.skipif(not HAS_GPU, reason="programs run one after another in the interpreter")
def test_runs_are_bitwise_equal() -> None:
    shape = Shape(seq_len=4096, num_queries=4096, heads=16, groups=4, topk=16, starts=(0, 4096), dim=128)
    problem = make_problem(shape, torch.bfloat16)
    first, second = (run_triton(run_pools, problem, Shape()) for _ in range(2))
    for field in dataclasses.fields(PoolOutput):
        a, b = getattr(first[0], field.name), getattr(second[0], field.name)
        assert a is None or torch.equal(a, b), field.name
    for field in dataclasses.fields(PoolGrads):
        assert torch.equal(getattr(first[1][0], field.name), getattr(second[1][0], field.name)), field.name


def test_schedule_equals_the_work_list() -> None:
    """The same lists of pairs per physical block as the tiled path works through."""
    problem = make_problem(Shape(groups=3), torch.float32)
    pool, block_table, position = problem.pools[0], problem.block_tables[0], problem.queries.position
    schedule = build_schedule(block_table, pool.block, position, None, block_size=16)
    partial = pool.block[block_table.clamp(min=0)] * 16 + 15 > position[:, None, None]
    for masked in (False, True):
        keep = (block_table >= 0) & (partial == masked)
        want = build_work_list(
            block_table.flatten(0, 1),
            keep.flatten(0, 1),
            num_physical_blocks=pool.block.numel(),
            rows_per_item=4,
        )
        items = schedule.items(pairs_per_item=4)[masked]
        count = int(items.num_items)
        assert items.physical_block[:count].tolist() == want.physical_block.tolist()
        pairs = [
            schedule.order[begin:stop].tolist()
            for begin, stop in zip(items.begin[:count], items.stop[:count], strict=True)
        ]
        assert pairs == [[pair for pair in row if pair >= 0] for row in want.pair.tolist()]


def test_items_example() -> None:
    """The example of the docstring."""
    block_table = torch.tensor([0, 0, 1, 0]).view(4, 1, 1)
    schedule = build_schedule(block_table, torch.tensor([0, 1]), torch.full((4,), 7), None, block_size=4)
    items, partial = schedule.items(pairs_per_item=2)
    assert int(partial.num_items) == 0
    assert schedule.order.tolist() == [0, 1, 3, 2]
    assert int(items.num_items) == 3
    assert items.physical_block[:3].tolist() == [0, 0, 1]
    assert items.begin[:3].tolist() == [0, 2, 3]
    assert items.stop[:3].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("first", "order", "offsets"),
    [(7, [0, 5, 1, 2, 4, 3], [0, 2, 5, 5, 5]), (6, [0, 5, 2, 4, 1, 3], [0, 2, 4, 4, 5])],
    ids=["all_whole", "own_block_in_part"],
)
def test_schedule_example(first: int, order: list[int], offsets: list[int]) -> None:
    """The example of the docstring."""
    block_table = torch.tensor([[0, 1], [1, -1], [1, 0]])[:, None]
    schedule = build_schedule(
        block_table, torch.tensor([0, 1]), torch.tensor([first, 8, 9]), None, block_size=4
    )
    assert schedule.order.tolist() == order
    assert schedule.offsets.tolist() == offsets
    assert schedule.used.tolist() == [1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("num_queries", "most", "length"),
    [
        (16384, 13797, 8192), (130, 101, 64), (129, 4096, 192), (640, 639, 320), (7, 64, 64),
        (100, 63, 63), (5, 1, 1), (5, 0, 1), (0, 200, 64),
    ],
)  # fmt: skip
def test_queries_per_portion(num_queries: int, most: int, length: int) -> None:
    """Equal portions on aligned borders; where fewer than 64 queries fit, as many as fit."""
    assert queries_per_portion(num_queries, most) == length


M3 = Shape(
    heads=16, dim=128, index_dim=128, block_size=128, seq_len=256, starts=(0, 256), num_queries=6, topk=2
)
# Portions of few queries: also the kernels that add to gradients of earlier portions.
SHIPPED = {
    "m3": (dataclasses.replace(M3, part_bytes=2**15), torch.bfloat16),
    "m3_temperature": (dataclasses.replace(M3, part_bytes=2**15, temperature=2.0), torch.bfloat16),
    "dim_256": (dataclasses.replace(M3, dim=256, index_dim=256), torch.bfloat16),
    "block_256": (dataclasses.replace(M3, block_size=256), torch.bfloat16),
    "odd": (
        dataclasses.replace(M3, heads=12, dim=96, index_dim=80, block_size=72, seq_len=288, starts=(0, 288)),
        torch.bfloat16,
    ),
    "small_window": (
        dataclasses.replace(M3, dim=64, block_size=64, window=100, with_index=False),
        torch.float16,
    ),
    "index_256": (
        dataclasses.replace(M3, dim=64, index_dim=256, block_size=256, starts=(0, 256)),
        torch.bfloat16,
    ),
    "m3_window": (dataclasses.replace(M3, window=300, with_index=False), torch.bfloat16),
    "fp32": (M3, torch.float32),
    "fp32_dim_256": (dataclasses.replace(M3, dim=256, index_dim=256, block_size=32), torch.float32),
}
# Each takes about half a minute: the main shape always, the others where they are asked for.
EVERY_SHAPE = bool(os.environ.get("MSA_KERNELS_COMPILE_ALL"))


def launch_all(shape: Shape, dtype: torch.dtype) -> None:
    """Launches every kernel for this problem; nothing is looked at."""
    from msa_kernels.block_sparse_attention import triton as triton_path

    problem = make_problem(shape, dtype)
    part = (problem.queries, problem.pools[0], problem.block_tables[0])
    with limits(shape):
        merged = triton_path.forward(*part)
        term = None if merged.lse_index is None else KlTerm(merged.lse_index, 0.1, merged.lse_teacher)
        triton_path.backward(*part, merged.out, merged.lse, merged.lse, term)


@needs_triton
@pytest.mark.parametrize("name", SHIPPED if EVERY_SHAPE else ["m3"])
def test_shipped_configurations_fit_hopper(name: str) -> None:
    """MSA_KERNELS_COMPILE_ALL=1: every table entry, not the main shape alone."""
    shape, dtype = SHIPPED[name]
    kernels = compiled_kernels(launch_all, shape, dtype)
    assert_fits_hopper(kernels)
    attend_kernels = [kernel for kernel in kernels if kernel.name.startswith("attend_")]
    assert len(attend_kernels) >= 4
    assert dtype == torch.float32 or all("wgmma" in kernel.ptx for kernel in attend_kernels)
    if shape.part_bytes:
        assert {kernel.constants.get("ADD") for kernel in attend_kernels} == {None, False, True}


@contextmanager
def candidate(table: str, number: int) -> Iterator[None]:
    """One of the backward's configurations that are to be timed, in front of the table."""
    from msa_kernels.block_sparse_attention import configs

    with pytest.MonkeyPatch.context() as patch:
        config = getattr(configs, f"{table}_CANDIDATES")[number]
        patch.setattr(configs, table, (config, *getattr(configs, table)))
        yield


def launch_candidate(table: str, number: int, shape: Shape, dtype: torch.dtype) -> None:
    """`launch_all` with one of them."""
    with candidate(table, number):
        launch_all(shape, dtype)


@needs_triton
@pytest.mark.parametrize(("table", "number"), CANDIDATES)
def test_candidates_fit_hopper(table: str, number: int) -> None:
    """Taken where the table is replaced, and without spills in the M3 shape."""
    config = getattr(configs, f"{table}_CANDIDATES")[number]
    kernels = compiled_kernels(launch_candidate, table, number, *SHIPPED["m3"])
    assert_fits_hopper(kernels)
    backward = [kernel for kernel in kernels if kernel.name == f"{table.lower()}_kernel"]
    assert {kernel.constants["ADD"] for kernel in backward} == {False, True}
    for kernel in backward:
        assert (kernel.constants["ROWS"], kernel.num_warps) == (config.rows, config.num_warps)
        print(f"{config}: {kernel.registers} registers, {kernel.shared_bytes} B")


@needs_triton
def test_candidates_equal_the_definition() -> None:
    """In fp16, as tables of 16 bits are not taken for fp32."""
    shape = Shape(block_size=128, dim=64, index_dim=16, seq_len=256, starts=(0, 256), heads=2, groups=1)
    problem = make_problem(shape, torch.float16)
    merged, want = run_triton(run_pools, problem, shape)
    for table, number in CANDIDATES:
        got = run_triton(run_candidate, table, number, problem, merged)
        for field in dataclasses.fields(PoolGrads):
            a, b = getattr(got[0], field.name), getattr(want[0], field.name)
            assert_rows_close(a, b.double(), TOLERANCE[torch.float16])


def run_candidate(table: str, number: int, problem: PoolProblem, merged: PoolOutput) -> list[PoolGrads]:
    """The backward with one of the configurations that are to be timed."""
    with candidate(table, number):
        return attend_backward(problem, merged, "triton")


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        (Shape(), torch.float64, "dtype=float64"),
        (Shape(dim=256, block_size=256, seq_len=256, starts=(0, 256)), torch.bfloat16, "head_dim=256"),
        (Shape(index_dim=300), torch.bfloat16, "index_head_dim=300"),
        (Shape(heads=65), torch.bfloat16, "heads per group=65: must be at most 64"),
        (Shape(heads=33, dim=130), torch.bfloat16, "heads per group=33: must be at most 32"),
        (Shape(heads=17), torch.float32, "heads per group=17: must be at most 16"),
        (Shape(), torch.bfloat16, None),
    ],
)
def test_unsupported(shape: Shape, dtype: torch.dtype, words: str | None) -> None:
    problem = make_problem(shape, dtype)
    queries = problem.queries
    why_not = unsupported(queries.q, problem.pools[0].kv, queries.q_index, queries.k_index)
    assert (why_not is None) == (words is None)
    assert words is None or words in str(why_not)


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_bad_kernel(kernel: str) -> None:
    problem = make_problem(Shape(), torch.float64)
    with pytest.raises(ValueError, match=f"kernel={kernel}"):
        pool_forward(problem.queries, problem.pools[0], problem.block_tables[0], kernel=kernel)


def test_auto_on_the_cpu_is_the_tiled_path() -> None:
    problem = make_problem(Shape(), torch.float32)
    outputs: list[Tensor] = [
        pool_forward(problem.queries, problem.pools[0], problem.block_tables[0], kernel=kernel).out
        for kernel in ("auto", "cpu")
    ]
    assert torch.equal(*outputs)
