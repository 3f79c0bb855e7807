"""The layer of experts: grouped products, tiles, host waits, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msa_train.config import Precision
from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.moe import ExpertLayer, experts, router
from msa_train.plan.trace.storage_tracker import StorageTracker
from tests.helpers.compare import assert_rows_close, worst_row
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.moe_layers import EPS, build, gradients, inputs
from tests.helpers.spawn import run_ranks


def one_by_one(run: Callable[[], Any]) -> Any:
    """Run with one product for each expert."""
    chosen = experts.grouped_mm_for
    experts.grouped_mm_for = lambda _device, _dtype: None
    try:
        return run()
    finally:
        experts.grouped_mm_for = chosen


def check_grouped_equals_one_by_one(rank: int, world_size: int) -> None:
    """On CPUs the same products, so the same numbers but for what a gate rounds."""
    for precision, dtype in ((Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)):
        layer = build(precision, ep_size=world_size)
        assert layer.experts.stacked() is not None
        given = inputs(layer, 50, rank)
        got = gradients(layer, *given)
        want = one_by_one(lambda layer=layer, given=given: gradients(layer, *given))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert worst_row(got[name], value) <= 4 * EPS[dtype], (precision, name)
        leave_groups()


def check_weights_lie_together(rank: int, world_size: int) -> None:
    """As the engine lays them, no pass copies them; elsewhere it does, to the same numbers."""
    for precision in (Precision.fp32, Precision.bf16):
        layer = build(precision, ep_size=world_size)
        stacked, matrices = layer.experts.stacked(), layer.experts.matrices()
        assert stacked is not None
        for whole, parts in zip(stacked, matrices, strict=True):
            assert len(whole) == len(parts) == 2
            for one, part in zip(whole, parts, strict=True):
                assert part.data_ptr() == one.data_ptr()
                assert part.is_contiguous()
        given = inputs(layer, 50, rank)
        want = gradients(layer, *given)
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data.clone()
        copied = layer.experts.stacked()
        assert copied is not None
        assert copied[0].data_ptr() != matrices[0][0].data_ptr()
        got = gradients(layer, *given)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
        leave_groups()


def check_tiles_equal_the_whole(rank: int, world_size: int) -> None:
    """Uneven tiles, in fp32 and bf16 too; weight gradients of bf16 tiles are rounded once each."""
    for precision, dtype in ((Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)):
        seen = []
        for tile_tokens in (0, 13, 64):
            layer = build(precision, ep_size=world_size, tile_tokens=tile_tokens)
            seen.append(gradients(layer, *inputs(layer, 50, rank)))
            leave_groups()
        for got in seen[1:]:
            for name, value in seen[0].items():
                assert worst_row(got[name], value) <= 8 * EPS[dtype], (precision, name)


def check_all_tokens_to_one_rank(rank: int, world_size: int) -> None:
    """A rank without a single row takes part all the same, with tiles and without, grouped or not."""
    for precision in (Precision.fp64, Precision.fp32):
        seen = []
        for tile_tokens in (0, 8):
            layer = build(precision, ep_size=world_size, tile_tokens=tile_tokens)
            assert layer.router.expert_bias is not None
            layer.router.expert_bias[:2] = 100.0
            got = gradients(layer, *inputs(layer, 20, rank))
            idle = [n for n in got if "local_experts" in n and not got[n].any()]
            assert (len(idle) > 0) is (rank > 0)
            seen.append(got)
            leave_groups()
        for name, value in seen[0].items():
            assert_rows_close(seen[1][name], value, 1e-5)


def check_padding_alone(rank: int, world_size: int) -> None:
    for tile_tokens in (0, 5):
        layer = build(Precision.fp32, ep_size=world_size, tile_tokens=tile_tokens)
        x, grad, mask = inputs(layer, 12, rank)
        got = gradients(layer, x, grad, torch.ones_like(mask))
        assert not any(value.any() for name, value in got.items() if "local_experts" in name)
        assert got["x"].any(), "through the shared expert"
        leave_groups()


def check_fused_router(rank: int, world_size: int) -> None:
    """Chosen, replayed, padded and counted as by the plain one; only the router differs here."""
    for tile_tokens in (0, 13):
        seen = []
        for is_fused in (False, True):
            layer = build(Precision.fp32, ep_size=world_size, tile_tokens=tile_tokens)
            layer.router.is_fused = is_fused
            assert layer.router.expert_bias is not None
            layer.router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
            found = gradients(layer, *inputs(layer, 50, rank), recomputed=True)
            assert layer.router.local_tokens_per_expert is not None
            seen.append(found | {"count": layer.router.local_tokens_per_expert.clone()})
            leave_groups()
        assert torch.equal(seen[0]["count"], seen[1]["count"])
        assert seen[0]["count"].sum() > 0
        assert seen[0]["router.weight"].any()
        for name, value in seen[0].items():
            assert worst_row(seen[1][name], value) <= 8 * EPS[torch.float32], name


class Waits(TorchDispatchMode):
    """Count what would make the host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation."""
        name = func.__name__.split(".")[0]
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def check_one_wait_a_layer(rank: int, world_size: int) -> None:
    """Forward once; backward and recomputation not at all."""
    asked: list[int] = []
    tolist = Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        asked.append(tensor.numel())
        return tolist(tensor)

    for precision in (Precision.fp64, Precision.bf16):
        for tile_tokens in (0, 13):
            layer = build(precision, ep_size=world_size, tile_tokens=tile_tokens)
            x, grad, mask = inputs(layer, 50, rank)
            record = SelectionRecord()
            asked.clear()
            Tensor.tolist = noted  # type: ignore[method-assign]
            try:
                with Waits() as waits:
                    for calls in (1, 2):
                        layer.record, record.calls = record, calls
                        out, _ = layer(x, padding_mask=mask)
                        assert len(asked) == 1, "the recomputation replays the routing"
                    out.backward(grad)
            finally:
                Tensor.tolist = tolist  # type: ignore[method-assign]
            assert waits.seen == []
            # of each expert and granule, what leaves and what arrives; of each granule, the busiest rank
            assert asked == [2 * 4 + 1 if tile_tokens == 0 else 25 * (2 * 4 + 1)]
            leave_groups()


def peak_bytes(layer: ExpertLayer, tokens: int) -> int:
    """Peak of forward and backward, above what is there before and after."""
    x, grad, mask = inputs(layer, tokens, 0)
    storages = StorageTracker(lambda _lines: "")
    with storages:
        storages.enter([x, grad, mask, *layer.parameters()])
        storages.enter([p.main_grad for p in layer.parameters()])  # type: ignore[attr-defined]
        before = storages.host_current
        out, _ = layer(x, padding_mask=mask)
        out.backward(grad)
    assert x.grad is not None
    return storages.host_peak.num_bytes - before - out.nbytes - x.grad.nbytes


def check_memory_of_tiles(rank: int, world_size: int) -> None:
    """M3's proportions at a tenth of its width: the peak does not grow with the tokens."""
    sizes: dict[str, Any] = {"hidden_size": 768, "moe_ffn_hidden_size": 384, "shared_expert_hidden_size": 384}
    peaks = {}
    router._CHUNK_TOKENS = 64
    for tile_tokens in (0, 64):
        for tokens in (512, 2048):
            layer = build(Precision.bf16, ep_size=world_size, tile_tokens=tile_tokens, **sizes)
            peaks[tile_tokens, tokens] = peak_bytes(layer, tokens)
            leave_groups()
    assert peaks[64, 2048] < 1.2 * peaks[64, 512], peaks
    assert peaks[64, 2048] < 0.3 * peaks[0, 2048], peaks


def check_gradient_without_a_buffer(rank: int, world_size: int) -> None:
    """A plain optimizer gets the sum of the tiles, rounded once."""
    layer = build(Precision.bf16, ep_size=world_size, tile_tokens=13)
    given = inputs(layer, 50, rank)
    want = gradients(layer, *given)
    bare = build_bare(layer)
    out, _ = bare(given[0], padding_mask=given[2])
    out.backward(given[1])
    for name, parameter in bare.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.grad, want[name].to(parameter.dtype)), name
    leave_groups()


def build_bare(layer: ExpertLayer) -> ExpertLayer:
    """The same layer with parameters that no engine knows."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    return layer


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_grouped_equals_one_by_one,
        check_weights_lie_together,
        check_tiles_equal_the_whole,
        check_all_tokens_to_one_rank,
        check_padding_alone,
        check_fused_router,
        check_one_wait_a_layer,
        check_memory_of_tiles,
        check_gradient_without_a_buffer,
    )
}


def run_checks(rank: int, world_size: int, names: list[str]) -> dict[str, str]:
    """Failures by name; one start of the ranks for all."""
    failed = {}
    for name in names:
        try:
            CHECKS[name](rank, world_size)
        except AssertionError as error:
            failed[name] = f"rank {rank}: {error}"
            leave_groups()
    return failed


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    found: dict[str, str] = {}
    for part in run_ranks(2, run_checks, list(CHECKS)):
        found |= part
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
