"""Do the steps of `rows` so that autograd knows them: for a layer without tiles."""

from typing import Any

import torch
from torch import Tensor

from msa_train.model.layers.moe.rows import Exchange, TileRows, reordered


class Take(torch.autograd.Function):
    """Copy tokens to rows, see TileRows.take."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: TileRows) -> Tensor:
        ctx.rows = rows
        return rows.take(tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.add_up(grad), None


class AddUp(torch.autograd.Function):
    """Sum the rows of each token, see TileRows.add_up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: TileRows) -> Tensor:
        ctx.rows = rows
        return rows.add_up(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.take(grad), None


class TakeSlots(torch.autograd.Function):
    """Pick a number for each row, see TileRows.take_slots."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: TileRows) -> Tensor:
        ctx.rows = rows
        return rows.take_slots(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.fill_slots(grad), None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reordered(grad, ctx.back), None, None


def reorder(rows: Tensor, order: Tensor | None, back: Tensor | None) -> Tensor:
    """Take rows in another order, of which `back` is the inverse; None: as they are."""
    return rows if order is None else _Reorder.apply(rows, order, back)  # type: ignore[return-value]


class Trade:
    """Send rows between ranks in two steps, `start` and `wait`; what autograd records between runs beside it.

    In the backward pass too: `wait` starts to send the gradient back, and `start` waits for it.
    """

    def __init__(self, exchange: Exchange, send: list[int], receive: list[int]) -> None:
        self.exchange, self.send, self.receive = exchange, send, receive

    def start(self, rows: Tensor) -> Tensor:
        """Begin: [sum(send), ...] -> [sum(receive), ...], not to be read before `wait`."""
        return _Start.apply(rows, self)  # type: ignore[return-value]

    def wait(self, rows: Tensor) -> Tensor:
        """Return what `start` returned, arrived."""
        return _Wait.apply(rows, self)  # type: ignore[return-value]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trade: Trade) -> Tensor:
        ctx.trade = trade
        out = trade.exchange.start(rows, trade.send, trade.receive).out
        assert out is not None, "just started"
        # one rank alone gets its own rows, and autograd would take them for changed in place
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trade.exchange.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trade: Trade) -> Tensor:
        ctx.trade = trade
        trade.exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trade = ctx.trade
        trade.exchange.start(grad, trade.receive, trade.send)
        # in the shape that autograd expects here; `_Start` returns what arrives
        return grad, None
