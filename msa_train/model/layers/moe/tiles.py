"""Compute a layer tile by tile of its tokens, keep its input alone: memory does not grow with length.

Forward, nothing is recorded. Backward, each tile is computed again and its gradients follow at once. Messages
travel under the computing of a neighbouring tile, forward and backward, two tiles' rows being there at once:

    compute   shared 0 | experts 0 | shared 1 | experts 1 | ...
    messages  rows 0 ........ rows 1 ........ back 0, rows 2 ...

Where a whole transformer layer is recomputed, its tiled part only takes its input again: nothing in that pass
reads the output of the layer's last step. So tiles cost no more computing than a recomputed layer does.

Weight gradients of tiles, each rounded to the weights' dtype by its product, add up in fp32 and come back
once, see `gradient_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msa_train.model.layers.moe import deepep
from msa_train.model.layers.moe.gradient_sums import GradientSums, learning
from msa_train.model.layers.moe.rows import Exchange, TileRows, reordered

PerToken = Callable[[Tensor], Tensor]
"[t, 1, H] -> [t, 1, H]"

if TYPE_CHECKING:
    from msa_train.model.layers.moe.layer import ExpertLayer
    from msa_train.model.layers.moe.routing import Routing


def _gradients(
    function: PerToken, parameters: Sequence[nn.Parameter], tokens: Tensor, grad: Tensor, sums: GradientSums
) -> Tensor:
    """Compute a function again and its gradients: tokens and grad [t, 1, H] -> gradient of tokens."""
    tokens = tokens.detach().requires_grad_()
    with torch.enable_grad():
        out = function(tokens)
    grad_tokens, *grads = torch.autograd.grad(out, (tokens, *parameters), grad)
    for parameter, one in zip(parameters, grads, strict=True):
        sums.add(parameter, one)
    return grad_tokens


class TiledExperts(torch.autograd.Function):
    """Run an MoE layer over tiles, routing apart; see the module."""

    @staticmethod
    def run(
        layer: ExpertLayer, routing: Routing, tokens: Tensor, probs: Tensor, *, is_output_needed: bool
    ) -> Tensor:
        """Compute tokens [T, H], probs [T, k] -> [T, H]; zeros where the output is not needed."""
        parameters = learning(layer.experts) + learning(layer.shared)
        return TiledExperts.apply(  # type: ignore[return-value]
            layer, routing, is_output_needed, parameters, tokens, probs, *parameters
        )

    @staticmethod
    def forward(
        ctx: Any,
        layer: ExpertLayer,
        routing: Routing,
        is_output_needed: bool,
        parameters: list[nn.Parameter],
        tokens: Tensor,
        probs: Tensor,
        *_parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.routing, ctx.parameters = layer, routing, parameters
        ctx.save_for_backward(tokens, probs)
        if not is_output_needed:
            return tokens.new_zeros(()).expand_as(tokens)
        forward = deepep.forward_tiles if layer.is_deepep else _forward_tiles
        return forward(layer, routing, tokens, probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = GradientSums(ctx.parameters)
        tokens, probs = ctx.saved_tensors
        backward = deepep.backward_tiles if ctx.layer.is_deepep else _backward_tiles
        grad_tokens, grad_probs = backward(ctx.layer, ctx.routing, tokens, probs, grad, sums)
        return None, None, None, None, grad_tokens, grad_probs, *sums.take()


@dataclass(slots=True)
class _Travelling:
    """Hold a tile whose rows are on their way."""

    number: int
    "of the tile"
    rows: TileRows
    "of the tile"
    exchanges: list[Exchange]
    "hidden states, probabilities and, backward, gradients of the outputs"
    shared: Tensor | None = None
    "what the shared expert adds, [t, H]"

    @property
    def part(self) -> slice:
        """Return where the tile's tokens are."""
        return slice(self.rows.tile.start, self.rows.tile.stop)

    def arrived(self) -> list[Tensor]:
        """Wait, and sort rows by expert."""
        return [reordered(exchange.wait(), self.rows.by_expert) for exchange in self.exchanges]

    def send_back(self, layer: ExpertLayer, *results: Tensor) -> None:
        """Begin to send rows back, sorted by expert as they are."""
        tile = self.rows.tile
        ordered = (reordered(one, self.rows.by_rank) for one in results)
        self.exchanges = [layer.exchange().start(one, tile.receive, tile.send) for one in ordered]


def _begin(
    layer: ExpertLayer, routing: Routing, number: int, tokens: Tensor, probs: Tensor, grad: Tensor | None
) -> _Travelling | None:
    """Begin to send the rows of a tile; None after the last one."""
    if number == len(routing.tiles):
        return None
    rows = TileRows(routing, number)
    tile, part = rows.tile, slice(rows.tile.start, rows.tile.stop)
    leaving = [rows.take(tokens[part]), rows.take_slots(probs[part])]
    if grad is not None:
        leaving.append(rows.take(grad[part]))
    exchanges = [layer.exchange().start(one, tile.send, tile.receive) for one in leaving]
    return _Travelling(number, rows, exchanges)


def _forward_tiles(layer: ExpertLayer, routing: Routing, tokens: Tensor, probs: Tensor) -> Tensor:
    out, weights, shared = torch.empty_like(tokens), layer.experts.stacked(), layer.shared
    returning: _Travelling | None = None

    def finish(done: _Travelling | None) -> None:
        if done is not None:
            result = done.rows.add_up(done.exchanges[0].wait())
            out[done.part] = result if done.shared is None else result.add_(done.shared)

    here = _begin(layer, routing, 0, tokens, probs, None)
    while here is not None:
        following = _begin(layer, routing, here.number + 1, tokens, probs, None)
        if shared is not None:
            here.shared = shared(tokens[here.part].unsqueeze(1)).squeeze(1)
        rows, scales = here.arrived()
        result = layer.experts.compute(weights, rows, scales, here.rows.offsets, here.rows.tile.per_expert)
        finish(returning)
        here.send_back(layer, result)
        del rows, scales, result
        here, returning = following, here
    finish(returning)
    return out


def _backward_tiles(
    layer: ExpertLayer, routing: Routing, tokens: Tensor, probs: Tensor, grad: Tensor, sums: GradientSums
) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and probs; those of weights are added to sums."""
    grad_tokens, grad_probs = torch.empty_like(tokens), torch.empty_like(probs)
    weights, shared = layer.experts.stacked(), layer.shared
    returning: _Travelling | None = None

    def finish(done: _Travelling | None) -> None:
        if done is not None:
            rows, scales = (exchange.wait() for exchange in done.exchanges)
            result = done.rows.add_up(rows)
            grad_tokens[done.part] = result if done.shared is None else result.add_(done.shared)
            grad_probs[done.part] = done.rows.fill_slots(scales)

    here = _begin(layer, routing, 0, tokens, probs, grad)
    while here is not None:
        following = _begin(layer, routing, here.number + 1, tokens, probs, grad)
        if shared is not None:
            part, given = tokens[here.part].unsqueeze(1), grad[here.part].unsqueeze(1)
            here.shared = _gradients(shared, learning(shared), part, given, sums).squeeze(1)
        grad_rows, grad_scales, found = layer.experts.gradients(
            weights, here.arrived(), here.rows.offsets, here.rows.tile.per_expert
        )
        for parameter, one in found:
            sums.add(parameter, one)
        del found
        finish(returning)
        here.send_back(layer, grad_rows, grad_scales)
        del grad_rows, grad_scales
        here, returning = following, here
    finish(returning)
    return grad_tokens, grad_probs


class TiledFunction(torch.autograd.Function):
    """Run a function that treats every token alone over tiles; see the file."""

    @staticmethod
    def run(
        function: PerToken,
        parameters: list[nn.Parameter],
        tokens: Tensor,
        tile_tokens: int,
        *,
        is_output_needed: bool,
    ) -> Tensor:
        """Compute tokens [T, 1, H] -> [T, 1, H]; zeros where the output is not needed.

        Args:
            function: of tokens.
            parameters: that it learns.
            tokens: of this rank.
            tile_tokens: of a tile.
            is_output_needed: false: only the backward pass will be.
        """
        return TiledFunction.apply(  # type: ignore[return-value]
            function, parameters, tile_tokens, is_output_needed, tokens, *parameters
        )

    @staticmethod
    def forward(
        ctx: Any,
        function: PerToken,
        parameters: list[nn.Parameter],
        tile_tokens: int,
        is_output_needed: bool,
        tokens: Tensor,
        *_parameters: Tensor,
    ) -> Tensor:
        ctx.function, ctx.tile_tokens, ctx.parameters = function, tile_tokens, parameters
        ctx.save_for_backward(tokens)
        if not is_output_needed:
            return tokens.new_zeros(()).expand_as(tokens)
        out = torch.empty_like(tokens)
        for source, target in zip(tokens.split(tile_tokens), out.split(tile_tokens), strict=True):
            target.copy_(function(source))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,), sums = ctx.saved_tensors, GradientSums(ctx.parameters)
        grad_tokens = torch.empty_like(tokens)
        tiles = (x.split(ctx.tile_tokens) for x in (tokens, grad, grad_tokens))
        for source, given, target in zip(*tiles, strict=True):
            target.copy_(_gradients(ctx.function, ctx.parameters, source, given, sums))
        return None, None, None, None, grad_tokens, *sums.take()
