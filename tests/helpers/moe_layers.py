"""A layer of experts by itself, with an engine's gradient buffers: its output and every gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from msa_train.config import Fusion, MoeDispatcher, Precision
from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.moe import ExpertLayer
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from tests.helpers.model_runs import small_config

# rounding of one number, relative
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def build(
    precision: Precision,
    *,
    ep_size: int,
    tile_tokens: int = 0,
    fusion: Fusion = Fusion.none,
    dispatcher: MoeDispatcher = MoeDispatcher.alltoall,
    **sizes: int,
) -> ExpertLayer:
    """The last layer's experts of a small model, with the engine's gradient buffers."""
    config = small_config(precision=precision, ep_size=ep_size, tile_tokens=tile_tokens, fusion=fusion)
    config.parallel.moe_dispatcher = dispatcher
    for name, value in sizes.items():
        setattr(config.model, name, value)
    engine = TorchEngine(config, build_groups(config.parallel, device=torch.device("cpu")))
    layer = engine.model.decoder.layers[-1].mlp
    assert isinstance(layer, ExpertLayer)
    # hooks of the buffers hold them by methods
    return layer.train()


def inputs(layer: ExpertLayer, tokens: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, 1, H], a gradient of the output, and a mask with some padding."""
    generator = torch.Generator().manual_seed(rank)
    shape = (tokens, 1, layer.config.hidden_size)
    dtype = layer.experts.matrices()[0][0].dtype
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.requires_grad_(), grad, (torch.arange(tokens) % 7 == 3).unsqueeze(0)


def gradients(
    layer: ExpertLayer, x: Tensor, grad: Tensor, mask: Tensor, *, recomputed: bool = False
) -> dict[str, Tensor]:
    """Output and every gradient of one forward and backward pass.

    recomputed: the forward pass is made again, as its transformer layer does it.
    """
    parameters = dict(layer.named_parameters())
    for parameter in parameters.values():
        parameter.main_grad.zero_()  # type: ignore[attr-defined]
    x.grad = None
    record = SelectionRecord()

    def run(hidden: Tensor) -> Tensor:
        if recomputed:
            record.calls += 1
            layer.record = record
        return layer(hidden, padding_mask=mask)[0]

    out: Any = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if recomputed else run(x)
    out.backward(grad)
    assert x.grad is not None
    found = {n: p.main_grad.clone() for n, p in parameters.items()}  # type: ignore[attr-defined]
    return found | {"out": out.detach(), "x": x.grad.clone()}
