"""`parallel.moe_dispatcher=deepep` over a stand-in of DeepEP: outputs and gradients of the all-to-all."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msa_train.config import MoeDispatcher, Precision
from tests.helpers import deep_ep_stand_in
from tests.helpers.compare import worst_row
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.moe_layers import EPS, build, gradients, inputs
from tests.helpers.spawn import run_ranks

# two experts on each of four ranks, three of them for a token
SIZES: dict[str, Any] = {"num_experts": 8, "moe_router_topk": 3}
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"recomputed": True},
    {"tile_tokens": 13},
    {"tile_tokens": 13, "recomputed": True},
    {"favoured": True},
    {"favoured": True, "tile_tokens": 8, "recomputed": True},
    {"padding_alone": True},
    {"padding_alone": True, "tile_tokens": 20},
)


def seen_by(
    dispatcher: MoeDispatcher,
    precision: Precision,
    rank: int,
    world_size: int,
    *,
    tile_tokens: int = 0,
    recomputed: bool = False,
    favoured: bool = False,
    padding_alone: bool = False,
) -> dict[str, Tensor]:
    layer = build(precision, ep_size=world_size, tile_tokens=tile_tokens, dispatcher=dispatcher, **SIZES)
    if favoured:
        # three of the experts get everything, ranks without one of them nothing
        assert layer.router.expert_bias is not None
        layer.router.expert_bias[:3] = 100.0
    x, grad, mask = inputs(layer, 50, rank)
    mask = torch.ones_like(mask) if padding_alone else mask
    found = gradients(layer, x, grad, mask, recomputed=recomputed)
    leave_groups()
    return found


def check_equal(rank: int, world_size: int) -> None:
    with deep_ep_stand_in.installed():
        for precision, dtype in ((Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)):
            for options in CASES:
                want = seen_by(MoeDispatcher.alltoall, precision, rank, world_size, **options)
                got = seen_by(MoeDispatcher.deepep, precision, rank, world_size, **options)
                assert got.keys() == want.keys()
                for name, value in want.items():
                    where = f"{precision}, {options}, {name}"
                    assert worst_row(got[name], value) <= 8 * EPS[dtype], where
                if not options.get("padding_alone"):
                    assert want["router.weight"].any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_alltoall(world_size: int) -> None:
    run_ranks(world_size, check_equal)
