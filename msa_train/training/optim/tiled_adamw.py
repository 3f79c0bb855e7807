"""Update by AdamW in pieces, with moments in fewer bits or on the host if wanted.

The arithmetic is torch's own, on fp32 (fp64 for fp64 parameters), whatever the moments are kept in. It is
elementwise, so pieces of 16.8M parameters give the same bits as whole tensors, with 64 MiB a temporary in
place of copies of everything: torch's `foreach` copies all second moments for their roots.
`msa_train.config.optimizer_bytes` counts what each setting takes.

Megatron's distributed optimizer, torch's AdamW and this one find `exp_avg` and `exp_avg_sq` in the same
place, state[parameter], as tensors shaped like the parameter that can be read as fp32 and copied to.

torchao's low-bit AdamW (0.18) was looked at: it keeps fp32 for shards whose size is no multiple of 256,
compiles anew for each of its shapes, wants gradients of the parameter's dtype and rates in tensors, which
Megatron does not give, and rounds fp8 moments to the nearest, so that one that shrinks by 5% stays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from msa_train.config import MomentsDtype
from msa_train.config.optimizer_bytes import PIECE_ELEMENTS, STREAMED_ELEMENTS
from msa_train.training.optim.block_scaled import BlockScaled
from msa_train.training.optim.host_stream import HostStream
from msa_train.training.optim.rounding import to_bf16

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class _Piece:
    """Name values `start` to `stop` of a flat parameter that is about to be updated."""

    parameter: Tensor
    gradient: Tensor
    "flat, of the whole parameter"
    step: Tensor
    "updates made before this one"
    start: int
    stop: int


class TiledAdamW(torch.optim.AdamW):
    """Update as torch.optim.AdamW(foreach=True) does, bit for bit with fp32 moments.

    Reads a parameter's gradient from `decoupled_grad` where that is set (Megatron's name: of any dtype, on
    the device of the update), else from `.grad`.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 1e-2,
        moments_dtype: MomentsDtype = MomentsDtype.fp32,
        offload: float = 0.0,
        copies: Iterable[Tensor] = (),
    ) -> None:
        """Take over parameters or groups of them.

        Args:
            params: as torch.optim.AdamW's.
            lr: learning rate.
            betas: decay of the moments.
            eps: added to the root of the second moment.
            weight_decay: where groups have none.
            moments_dtype: of the moments between updates.
            offload: share of the parameters whose moments are on the host; so are they if in `copies`.
            copies: parameters that only the optimizer uses; they are moved to the host in place.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
        self.moments_dtype = moments_dtype
        self.offload = offload
        self.gradient_factor = 1.0
        self._streamed: set[int] = set()
        self._streamed_copies: set[int] = set()
        self._stream: HostStream | None = None
        self.move_to_host(copies)

    @classmethod
    def replacing(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        moments_dtype: MomentsDtype,
        offload: float,
        copies: Iterable[Tensor],
    ) -> "TiledAdamW":
        """Return one with the groups and settings of another Adam that has made no update yet.

        Its parameters may be views of others, as Megatron's shards of fp32 weights are.
        """
        settings = optimizer.defaults
        # torch refuses views in the constructor
        made = cls(
            [torch.nn.Parameter(torch.empty(0))],
            lr=settings["lr"],
            betas=settings["betas"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            moments_dtype=moments_dtype,
            offload=offload,
        )
        made.param_groups = optimizer.param_groups
        for group in made.param_groups:
            for name, value in made.defaults.items():
                group.setdefault(name, value)
        made.move_to_host(copies)
        return made

    def move_to_host(self, copies: Iterable[Tensor]) -> None:
        """Choose the parameters whose state is on the host, and move those that are copies there."""
        movable = {id(parameter) for parameter in copies}
        chosen = _share([p for group in self.param_groups for p in group["params"]], self.offload)
        for parameter in chosen:
            self._streamed.add(id(parameter))
            if self._stream is None:
                self._stream = HostStream(parameter.device)
            if id(parameter) in movable:
                self._streamed_copies.add(id(parameter))
                pin = parameter.is_cuda
                host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pin)
                parameter.data = host.copy_(parameter.data)

    def allocate(self) -> None:
        """Make moments of zero for all parameters that have none: Megatron's saving and loading want some."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.moments_of(parameter)

    def moments_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter, made as torch makes it where there was no update yet."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            for name in _MOMENTS:
                state[name] = self._zeros(parameter, is_root=name == "exp_avg_sq")
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        return state

    def _zeros(self, parameter: Tensor, *, is_root: bool) -> Tensor:
        """Make a moment, on the host where the parameter's state is."""
        is_streamed = id(parameter) in self._streamed
        device = torch.device("cpu") if is_streamed else parameter.device
        pin = is_streamed and self._stream is not None and self._stream.device.type == "cuda"
        if self.moments_dtype is MomentsDtype.fp8:
            return BlockScaled.zeros(parameter.shape, device, is_root=is_root, pin=pin)
        dtype = torch.bfloat16 if self.moments_dtype is MomentsDtype.bf16 else parameter.dtype
        return torch.empty(parameter.shape, dtype=dtype, device=device, pin_memory=pin).zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; bf16 ones are multiplied by `gradient_factor`.

        Takes at most 0.9 GiB of temporaries (`optimizer_bytes(...).step_temporary`) and, as 1.7B parameters
        are 100 pieces and those of less than a piece go together, about 15 ms of Python.
        """
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            resident, streamed = self._pieces_of(group)
            batches = iter(_batches(resident))
            if streamed:
                self._update_streamed(group, streamed, batches)
            for batch in batches:
                self._update(group, batch, [self._on_device(piece) for piece in batch])

    def _pieces_of(self, group: dict[str, Any]) -> tuple[list[_Piece], list[_Piece]]:
        """Cut a group's parameters into pieces of the device and of the host, and count the update."""
        resident: list[_Piece] = []
        streamed: list[_Piece] = []
        for parameter in group["params"]:
            gradient = _gradient(parameter)
            if gradient is None or not parameter.numel():
                continue
            state = self.moments_of(parameter)
            before = state["step"].clone()
            state["step"].add_(1)
            on_host = id(parameter) in self._streamed
            size = STREAMED_ELEMENTS if on_host else PIECE_ELEMENTS
            flat = gradient.reshape(-1)
            for start in range(0, parameter.numel(), size):
                stop = min(start + size, parameter.numel())
                piece = _Piece(parameter, flat, before, start, stop)
                (streamed if on_host else resident).append(piece)
        return resident, streamed

    def _on_device(self, piece: _Piece) -> list[Tensor]:
        """Return weight and both moments of a piece: flat, views of what is kept."""
        return [_cut(piece.parameter.detach(), piece), *self._kept_moments(piece)]

    def _kept_moments(self, piece: _Piece) -> list[Tensor]:
        state = self.state[piece.parameter]
        return [_cut(state[name], piece) for name in _MOMENTS]

    def _update_streamed(
        self, settings: dict[str, Any], pieces: list[_Piece], resident: Iterator[list[_Piece]]
    ) -> None:
        """Update what is on the host, and in between, under the transfers, what is on the device."""
        assert self._stream is not None, "made with the first parameter of the host"
        # pieces that bring their weights along and such that do not, as fp32 models have both
        for with_weight in (True, False):
            chosen = [p for p in pieces if (id(p.parameter) in self._streamed_copies) is with_weight]
            kept = [self._on_device(p) if with_weight else self._kept_moments(p) for p in chosen]

            def change(
                number: int,
                copies: list[Tensor],
                chosen: list[_Piece] = chosen,
                kept: list[list[Tensor]] = kept,
                with_weight: bool = with_weight,
            ) -> None:
                piece = chosen[number]
                values = _rebuild(kept[number], copies)
                if not with_weight:
                    values = [_cut(piece.parameter.detach(), piece), *values]
                self._update(settings, [piece], [values])
                batch = next(resident, None)
                if batch is not None:
                    self._update(settings, batch, [self._on_device(piece) for piece in batch])

            self._stream.run([[raw for tensor in values for raw in _raw(tensor)] for values in kept], change)

    def _update(self, group: dict[str, Any], pieces: list[_Piece], kept: list[list[Tensor]]) -> None:
        """Update pieces together.

        Args:
            group: with learning rate, betas, eps and weight decay.
            pieces: what is updated.
            kept: weight and moments of each on the device, in the dtypes that they are kept in.
        """
        beta1, beta2 = group["betas"]
        weights = [values[0] for values in kept]
        first = [_wide(values[1]) for values in kept]
        second = [_wide(values[2]) for values in kept]
        steps = [piece.step.clone() for piece in pieces]
        gradients = [
            self._wide_gradient(piece, weight) for piece, weight in zip(pieces, weights, strict=True)
        ]
        adamw(
            weights,
            gradients,
            first,
            second,
            [],
            steps,
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for piece, values, wide in zip(pieces, kept, zip(first, second, strict=True), strict=True):
            salt = 2 * int(piece.step)
            _keep(values[1], wide[0], salt, piece.start)
            _keep(values[2], wide[1], salt + 1, piece.start)

    def _wide_gradient(self, piece: _Piece, weight: Tensor) -> Tensor:
        gradient = piece.gradient[piece.start : piece.stop]
        if gradient.dtype == weight.dtype:
            return gradient
        return gradient.to(weight.dtype).mul_(self.gradient_factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of any precision, as torch does, and keep it in this one's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                loaded = self.state.get(parameter)
                if not loaded:
                    continue
                self.state[parameter] = {"step": loaded.get("step", torch.tensor(0.0))}
                moments = self.moments_of(parameter)
                for name in _MOMENTS:
                    moments[name].copy_(loaded[name])


def set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Hand a gradient to the optimizer: as `.grad`, or as `decoupled_grad` where torch would refuse it."""
    if gradient.dtype == parameter.dtype and gradient.device == parameter.device:
        parameter.grad = gradient
    else:
        parameter.decoupled_grad = gradient  # type: ignore[attr-defined]


def drop_gradient(parameter: Tensor) -> None:
    """Forget the gradient that `set_gradient` handed over."""
    parameter.grad = None
    parameter.decoupled_grad = None  # type: ignore[attr-defined]


def _gradient(parameter: Tensor) -> Tensor | None:
    decoupled = getattr(parameter, "decoupled_grad", None)
    return parameter.grad if decoupled is None else decoupled


def _share(parameters: list[Tensor], share: float) -> list[Tensor]:
    """Choose parameters of about this share of all elements, evenly over the list.

    Example: four of 10 elements each and 0.5 -> the first and the third, or the second and the fourth.
    """
    chosen, total, taken = [], 0, 0
    for parameter in parameters:
        total += parameter.numel()
        wanted = share * total
        if abs(taken + parameter.numel() - wanted) < abs(taken - wanted):
            taken += parameter.numel()
            chosen.append(parameter)
    return chosen


def _batches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Put pieces together up to the size of one: a model has hundreds of small parameters."""
    batch: list[_Piece] = []
    count = 0
    for piece in pieces:
        size = piece.stop - piece.start
        if batch and count + size > PIECE_ELEMENTS:
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += size
    if batch:
        yield batch


def _cut(tensor: Tensor, piece: _Piece) -> Tensor:
    """Return the flat values of a piece."""
    if isinstance(tensor, BlockScaled):
        return tensor.part(piece.start, piece.stop)
    return tensor.view(-1)[piece.start : piece.stop]


def _wide(moment: Tensor) -> Tensor:
    """Return a moment in the dtype of the arithmetic: itself if it is in that already."""
    if isinstance(moment, BlockScaled):
        return moment.read()
    return moment.float() if moment.dtype == torch.bfloat16 else moment


def _keep(moment: Tensor, values: Tensor, salt: int, first: int) -> None:
    """Round new values into a moment; `first`: their place in the parameter."""
    if isinstance(moment, BlockScaled):
        moment.write(values, salt)
    elif moment.dtype == torch.bfloat16:
        moment.copy_(to_bf16(values, salt, first=first))


def _raw(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors that make up a tensor."""
    return [tensor.codes, tensor.scales] if isinstance(tensor, BlockScaled) else [tensor]


def _rebuild(kept: list[Tensor], copies: list[Tensor]) -> list[Tensor]:
    """Put plain copies together as the tensors that they were copied from are."""
    left = iter(copies)
    return [
        tensor.with_parts(next(left), next(left)) if isinstance(tensor, BlockScaled) else next(left)
        for tensor in kept
    ]
