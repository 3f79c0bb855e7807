"""Selective recomputation and offloading on one rank: what runs twice, what stays, same bits."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from msa_train.config import Recompute, RunConfig
from msa_train.model.attention.base import GroupedQueryAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.layers import offload
from msa_train.model.layers.moe import ExpertLayer
from msa_train.model.layers.norm import RMSNorm
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import small_config, step_packs
from tests.helpers.spawn import run_ranks


def engine_of(config: RunConfig) -> TorchEngine:
    if parallel_state.model_parallel_is_initialized():
        leave_groups()
    return TorchEngine(config, build_groups(config.parallel, device=torch.device("cpu")))


def gradients(engine: TorchEngine, packs: int = 1) -> list[torch.Tensor]:
    """Of the losses of so many packs, all forward passes before all backward passes, as in a pipeline."""
    engine.model.train()
    losses = []
    for pack in step_packs()[0][:packs]:
        params = engine.forward.prepare(pack, num_tokens=96, comm=engine.groups.cp_comm(), stats=LayerStats())
        losses.append(engine.forward(engine.model, params).sum())
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    found: list[torch.Tensor] = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        for total, one in zip(found, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if one is not None:
                total += one
    return found


def check_same_bits() -> None:
    """Whatever is recomputed or offloaded; two micro-batches in flight."""
    want = gradients(engine_of(small_config()), packs=2)
    assert any(x.abs().max() > 0 for x in want)
    cases: list[dict[str, Any]] = [{"recompute": Recompute.full, "offload": True}, {"offload": True}]
    cases += [
        {"recompute": Recompute.selective, "modules": modules, "offload": is_offloaded}
        for modules in ("attention", "experts", "ffn", "norm", "attention,experts,ffn,norm")
        for is_offloaded in (False, True)
    ]
    for case in cases:
        for got, expected in zip(gradients(engine_of(small_config(**case)), packs=2), want, strict=True):
            assert torch.equal(got, expected), case


def counted_runs(config: RunConfig) -> Counter[str]:
    """How often each kind of part ran in one forward and backward pass, over four layers."""
    runs: Counter[str] = Counter()
    engine = engine_of(config)

    def count(name: str, target: Any, method: str) -> None:
        original = getattr(target, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            runs[name] += 1
            return original(*args, **kwargs)

        setattr(target, method, counted)

    for layer in engine.model.decoder.layers:
        assert isinstance(layer.self_attention, GroupedQueryAttention)
        count("attention", layer.self_attention, "attend")
        if hasattr(layer.self_attention, "_select"):
            count("selection", layer.self_attention, "_select")
        # what is recomputed has its original elsewhere
        name = "experts" if isinstance(layer.mlp, ExpertLayer) else "ffn"
        count(name, *((layer, "_run_mlp") if hasattr(layer, "_run_mlp") else (layer.mlp, "forward")))
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            assert isinstance(norm, RMSNorm)
            count("norm", norm, "normalise")
    tokens = [layer.mlp.router for layer in engine.model.decoder.layers if hasattr(layer.mlp, "router")]
    gradients(engine)
    routed = {int(router.local_tokens_per_expert.sum()) for router in tokens}
    # 96 tokens with two experts each, counted once
    assert routed == {192}
    return runs


def check_only_what_is_named_runs_again() -> None:
    plain = {"attention": 4, "selection": 2, "experts": 3, "ffn": 1, "norm": 8}
    assert counted_runs(small_config()) == plain
    for module in ("attention", "experts", "ffn"):
        again = counted_runs(small_config(recompute=Recompute.selective, modules=module))
        assert again == plain | {module: 2 * plain[module]}, module
    # formed again for its users and for its own gradient
    assert counted_runs(small_config(recompute=Recompute.selective, modules="norm"))["norm"] == 24
    full = counted_runs(small_config(recompute=Recompute.full))
    assert full == {name: 2 * count for name, count in plain.items()} | {"selection": 2}


def check_kept_tensors_leave_and_buffers_serve_again() -> None:
    """Of tensors given to the host only those of the last two layers are alive when the forward pass ends."""
    sent: list[list[weakref.ref[torch.Tensor]]] = []
    leave = offload._Store.leave

    def watched(self: offload._Store, tensors: list[torch.Tensor]) -> None:
        sent.append([weakref.ref(tensor) for tensor in tensors])
        leave(self, tensors)

    offload._Store.leave = watched  # type: ignore[method-assign]
    engine = engine_of(small_config(offload=True))
    store = offload._store(torch.device("cpu"))
    made = Counter[int]()
    host_buffer = store.stream.host_buffer

    def counted(num_bytes: int) -> torch.Tensor:
        made[num_bytes] += 1
        return host_buffer(num_bytes)

    store.stream.host_buffer = counted  # type: ignore[method-assign]
    gradients(engine)
    assert len(sent) == 4
    assert min(len(tensors) for tensors in sent) > 5
    gc.collect()
    alive = [sum(reference() is not None for reference in tensors) for tensors in sent]
    assert alive[:2] == [0, 0]
    first = dict(made)
    assert first == {size: len(buffers) for size, buffers in store._free.items()}
    gradients(engine)
    assert made == first
    # small tensors, whole numbers and weights stay
    offload.MIN_BYTES = 2**20
    made.clear()
    sent.clear()
    gradients(engine)
    assert [len(tensors) for tensors in sent] == [0, 0, 0, 0]


def check_previous_layer_is_on_its_way() -> None:
    """The first tensor that a layer asks for brings back the layer before, and none before that."""
    chain = offload.OffloadChain()
    layers = []
    for value in range(3):
        layer = offload.OffloadedLayer(chain, set(), torch.device("cpu"))
        packed = layer.pack(torch.full((4, 4), float(value)).T)
        layer.end()
        layers.append((layer, packed))
    assert not isinstance(layers[2][1], torch.Tensor)
    back = layers[2][0].unpack(layers[2][1])
    assert torch.equal(back, torch.full((4, 4), 2.0))
    assert back.stride() == (1, 4)
    assert [layer._is_fetched for layer, _ in layers] == [False, True, True]
    shared = torch.ones(4)
    kept = offload.OffloadedLayer(chain, {offload.storage_of(shared)}, torch.device("cpu"))
    for stays in (shared, shared[1:], torch.ones(3, dtype=torch.int64), torch.ones(1).expand(9)):
        assert kept.pack(stays) is stays


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_same_bits,
        check_only_what_is_named_runs_again,
        check_kept_tensors_leave_and_buffers_serve_again,
        check_previous_layer_is_on_its_way,
    )
}


def run_check(rank: int, world_size: int, name: str) -> None:
    offload.MIN_BYTES = 0
    CHECKS[name]()


@pytest.mark.parametrize("name", CHECKS)
def test_on_one_rank(name: str) -> None:
    run_ranks(1, run_check, name)
