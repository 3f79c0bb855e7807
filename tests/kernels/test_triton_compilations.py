"""How many kernels Triton compiles: each takes seconds of a run's start, while a GPU waits."""

import dataclasses
import os
from collections import Counter

import pytest
import torch

from tests.helpers.pool_problems import Shape
from tests.helpers.triton_env import CompiledKernel, compiled_kernels, needs_triton
from tests.kernels.test_triton_block_sparse_attention import launch_all

pytestmark = needs_triton
# The number does not depend on the head dims, but the time to compile does.
SMALL = Shape(heads=4, dim=16, index_dim=16, num_queries=448, seq_len=512, starts=(0, 512))
M3 = dataclasses.replace(SMALL, heads=16, dim=128, index_dim=128, block_size=128)
SHAPES = {"small": SMALL} | ({"m3": M3} if os.environ.get("MSA_KERNELS_COMPILE_ALL") else {})
# Queries that fit a portion of the forward: an odd number. In the backward it is about twice as many.
MOST_QUERIES = 101


def launch_groups(shape: Shape, groups: tuple[int, ...], most_queries: int) -> None:
    """Launch every kernel for these numbers of groups."""
    for M in groups:
        part_bytes = most_queries * M * shape.topk * 2 * shape.heads * shape.dim
        launch_all(dataclasses.replace(shape, groups=M, part_bytes=part_bytes), torch.bfloat16)


def counted(kernels: list[CompiledKernel]) -> Counter[tuple[str, object, object]]:
    """How many of each name, by MASKED and ADD."""
    return Counter((k.name, k.constants.get("MASKED"), k.constants.get("ADD")) for k in kernels)


@pytest.mark.parametrize("name", SHAPES)
def test_number_of_kernels(name: str) -> None:
    """One for any number of groups where nothing is masked; later portions need those that add."""
    shape = SHAPES[name]
    one_portion = counted(compiled_kernels(launch_groups, shape, (4,), 1000))
    several = counted(compiled_kernels(launch_groups, shape, (4,), MOST_QUERIES))
    for_all = counted(compiled_kernels(launch_groups, shape, (4, 2, 1), MOST_QUERIES))
    totals = [counts.total() for counts in (one_portion, several, for_all)]
    print(
        f"{name}: {totals[0]} kernels, {totals[1]} with several portions, {totals[2]} for 4, 2 and 1 groups"
    )
    adding = [("attend_backward_kernel", False, True), ("kl_backward_kernel", False, True)]
    assert several == one_portion + Counter(adding)
    # those with masks divide by the number of groups
    assert for_all == several + Counter({key: 2 * number for key, number in several.items() if key[1]})


def launch_pools(shapes: list[Shape]) -> None:
    """Launch every kernel for pools of these sizes, one KV head."""
    for shape in shapes:
        launch_all(dataclasses.replace(shape, groups=1), torch.bfloat16)


def test_any_number_of_blocks() -> None:
    """How many blocks were fetched changes from step to step: 32, then 33."""
    even, odd = SMALL, dataclasses.replace(SMALL, seq_len=528, starts=(0, 528))
    want = counted(compiled_kernels(launch_pools, [even]))
    assert counted(compiled_kernels(launch_pools, [even, odd])) == want
