"""Send tokens to their experts by DeepEP, through Megatron's binding of it, in place of `rows.Exchange`.

DeepEP sends a token to a rank once, however many of its experts are there, and over the network once to each
node. Its rows are then made, and added up again, on the rank of the experts: a token's rows of one rank are
added in fp32 and rounded to the tokens' dtype, and DeepEP adds the ranks' sums in fp32 and rounds once more.

Where tokens go and how they are cut into tiles is planned as ever (`routing`). DeepEP finds the same out for
itself: it lets the host wait in every dispatch, so once more a layer, or a tile, and again where that is
recomputed. Nothing is computed beside its messages, and the backward pass of a tile makes the tile's whole
forward pass again, its combining message included.

Cost for M3 (128 experts, 4 a token), by arithmetic: of the 4 rows of a token, ranks with 16 experts are sent
3.34 on average, ranks with 2 experts 3.95; over 8 nodes of 16 experts 3.34 cross to a node. DeepEP's buffers,
one set for all layers, lie beside torch's memory.

No GPU has run this. Tests put a stand-in under the binding that trades rows over gloo.

Shapes: t tokens of a tile, k experts a token, H width, A tokens that arrive, L experts of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor, nn

from msa_train.model.layers.moe.dispatch import AddUp, Take, TakeSlots
from msa_train.model.layers.moe.gradient_sums import GradientSums, learning
from msa_train.model.layers.moe.rows import SlotRows, expert_offsets, tile_counts
from msa_train.parallel.comm.fault_watch import watched

if TYPE_CHECKING:
    from msa_train.model.layers.moe.experts import GroupedExperts
    from msa_train.model.layers.moe.layer import ExpertLayer
    from msa_train.model.layers.moe.routing import Routing


def check_installed() -> None:
    """Check that Megatron has found DeepEP.

    Raises:
        ValueError: it has not.
    """
    if not fused_a2a.HAVE_DEEP_EP:
        raise ValueError(
            "parallel.moe_dispatcher=deepep: the deep_ep package cannot be imported; install DeepEP, or use "
            "parallel.moe_dispatcher=alltoall"
        )


def compute(
    layer: ExpertLayer,
    routing: Routing,
    number: int,
    tokens: Tensor,
    probs: Tensor,
    weights: list[Tensor] | None,
) -> Tensor:
    """Compute a tile, recorded by autograd, the shared expert added: tokens [t, H], probs [t, k] -> [t, H].

    Args:
        layer: of experts.
        routing: of the layer's call.
        number: of the tile.
        tokens: of the tile, bf16.
        probs: fp32, which is all that DeepEP takes.
        weights: of `GroupedExperts.stacked`.
    """
    tile, num_experts = routing.tiles[number], layer.config.model.num_experts
    experts = routing.experts[tile.start : tile.stop].long()
    # by the name that DeepEP has for none
    experts = experts.masked_fill(experts == num_experts, -1)
    with watched("expert", layer.number):
        arrived, local, scales, _, handle = fused_a2a.fused_dispatch(
            tokens, experts, probs, num_experts, layer.ep_group
        )
    # arrived [A, H]; local and scales [A, k]: number among the experts of this rank, -1 for those elsewhere
    rows = SlotRows(local.masked_fill(local < 0, len(tile.per_expert)), sum(tile.per_expert))
    out = layer.experts.compute(
        weights,
        Take.apply(arrived, rows),  # type: ignore[arg-type]
        TakeSlots.apply(scales, rows),  # type: ignore[arg-type]
        expert_offsets(tile_counts(routing, number)),
        tile.per_expert,
    )
    added = AddUp.apply(out, rows)
    with watched("expert", layer.number):
        combined: Tensor = fused_a2a.fused_combine(added, layer.ep_group, handle)[0]
    shared = layer.shared
    return combined if shared is None else combined + shared(tokens.unsqueeze(1)).squeeze(1)


def forward_tiles(layer: ExpertLayer, routing: Routing, tokens: Tensor, probs: Tensor) -> Tensor:
    """Compute all tiles, one after the other: tokens [T, H], probs [T, k] -> [T, H]."""
    out, weights = torch.empty_like(tokens), layer.experts.stacked()
    for number, tile in enumerate(routing.tiles):
        part = slice(tile.start, tile.stop)
        out[part] = compute(layer, routing, number, tokens[part], probs[part], weights)
    return out


def backward_tiles(
    layer: ExpertLayer, routing: Routing, tokens: Tensor, probs: Tensor, grad: Tensor, sums: GradientSums
) -> tuple[Tensor, Tensor]:
    """Compute all tiles again, and gradients: of tokens and probs; those of weights are added to sums."""
    grad_tokens, grad_probs = torch.empty_like(tokens), torch.empty_like(probs)
    weights = layer.experts.stacked()
    if weights is not None:
        # gradients arrive here and not at each expert's own matrix
        weights = [weight.detach().requires_grad_() for weight in weights]
    learners = _learners(layer.experts, weights) + [(p, [p]) for p in learning(layer.shared)]
    for number, tile in enumerate(routing.tiles):
        part = slice(tile.start, tile.stop)
        inputs = tokens[part].detach().requires_grad_(), probs[part].detach().requires_grad_()
        with torch.enable_grad():
            out = compute(layer, routing, number, *inputs, weights)
        learn = [tensor for tensor, _ in learners]
        grad_tokens[part], grad_probs[part], *found = torch.autograd.grad(out, (*inputs, *learn), grad[part])
        for (tensor, parameters), one in zip(learners, found, strict=True):
            each = [one] if tensor is parameters[0] else one.unbind()
            for parameter, gradient in zip(parameters, each, strict=True):
                sums.add(parameter, gradient)
    return grad_tokens, grad_probs


def _learners(
    experts: GroupedExperts, weights: list[Tensor] | None
) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """List what learns, with the parameters that it stands for, one for each row of a stack."""
    if weights is None:
        return [(parameter, [parameter]) for parameter in learning(experts)]
    pairs = zip(weights, experts.matrices(), strict=True)
    return [(weight, matrices) for weight, matrices in pairs if matrices[0].requires_grad]
