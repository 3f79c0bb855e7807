"""fp32 keeps its digits: no product goes to tensor cores as tf32, which the interpreter would not show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.pool_problems import Shape
from tests.helpers.triton_env import compiled_kernels, needs_triton
from tests.kernels import test_triton_decode as decode
from tests.kernels import test_triton_dense_kl as dense_kl
from tests.kernels import test_triton_select_blocks as select_blocks
from tests.kernels.test_triton_block_sparse_attention import launch_all

pytestmark = needs_triton
# Head dims of one chunk and of several, where the products are not the same lines
LAUNCHES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "select_blocks": (
        select_blocks._launch_shipped,
        ([(16, 16, 4, "float32"), (32, 32, 4, "float32"), (128, 128, 16, "float32")], None),
    ),
    "select_blocks_lse": (
        select_blocks._launch_shipped,
        ([(16, 16, 4, "float32"), (32, 32, 4, "float32"), (128, 64, 4, "float32")], 0.1),
    ),
    "block_sparse_attention": (launch_all, (Shape(temperature=2.0), torch.float32)),
    "decode": (decode._launch_shipped, ([(32, 16, 4, "float32")] * 2, [None, True])),
    "dense_kl": (dense_kl._compiled, ([(2, 32, 16, "float32")],)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_tf32(name: str) -> None:
    launch, arguments = LAUNCHES[name]
    kernels = compiled_kernels(launch, *arguments)
    assert kernels
    for kernel in kernels:
        assert "tf32" not in kernel.ptx, f"{kernel.name} {kernel.constants}"
