"""The checks before timing reach what they are named for: further portions, lists in several parts."""

from collections import Counter
from typing import Any

import torch

from benchmarks.gpu.check_attention import CASES, attention_cases
from benchmarks.gpu.problem import SMOKE, Tensors
from tests.helpers.triton_env import needs_triton, run_triton


def reached(name: str) -> dict[str, int]:
    """Portions of the backward, and the most parts of a list, of one case at tiny sizes."""
    from msa_kernels.block_sparse_attention.triton import launch_backward

    found: Counter[str] = Counter()
    work, add_splits = launch_backward._backward_portion, launch_backward._add_splits

    def portion(*args: Any) -> None:
        found["portions"] += 1
        work(*args)

    def splits(part: Any, *args: Any) -> None:
        found["parts"] = max(found["parts"], int(part.splits.count.max()))
        add_splits(part, *args)

    launch_backward._backward_portion, launch_backward._add_splits = portion, splits
    try:
        tensors = Tensors(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float16, 3)
        cases = attention_cases(tensors, SMOKE, "triton", seq_len=128, num_queries=16)
        assert all(check.passed for check in cases[name]())
    finally:
        launch_backward._backward_portion, launch_backward._add_splits = work, add_splits
    return dict(found)


@needs_triton
def test_portions_and_split_lists_are_reached() -> None:
    for name in ("attention, portions, split lists", "attention, one group"):
        found = run_triton(reached, name)
        assert found["portions"] >= CASES[name].portions == 4
        assert found["parts"] >= 2
    assert run_triton(reached, "attention")["portions"] == 1
