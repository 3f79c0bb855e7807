"""Keep an fp32 tensor in fp8: e4m3 codes, one power of two per 256 values.

To others it is an fp32 tensor: reading it (`float`, `cpu`, `clone`, arithmetic) gives fp32 values, and
`copy_` into it rounds. So checkpoints hold fp32 moments, which any other setting loads;
and what was read is equal, bit for bit, once it is copied back. Reading makes the whole fp32 tensor: while
saving that is one parameter at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from msa_train.config.optimizer_bytes import FP8_BLOCK, PIECE_ELEMENTS
from msa_train.training.optim.rounding import power_of_two_scale, to_e4m3

# values that are rounded at a time, in a dozen temporaries
_WRITTEN = 2**22
_READS = (Tensor.float, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.numpy, Tensor.tolist)


class BlockScaled(Tensor):
    """Look like fp32 values of a shape, kept as codes and scales: 1.016 bytes per value."""

    codes: Tensor
    "float8_e4m3fn, flat"
    scales: Tensor
    "fp32 powers of two, one per 256 codes"
    is_root: bool
    "codes are square roots of the values, which are at least 0"
    first: int
    "place of the first value in its parameter"

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, shape: torch.Size, *, is_root: bool, first: int = 0
    ) -> "BlockScaled":
        """Wrap codes and scales, which are shared."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scales, made.is_root, made.first = codes, scales, is_root, first
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def with_parts(self, codes: Tensor, scales: Tensor) -> "BlockScaled":
        """Return the same values with other copies of codes and scales."""
        return BlockScaled(codes, scales, self.shape, is_root=self.is_root, first=self.first)

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device, *, is_root: bool, pin: bool) -> "BlockScaled":
        """Make zeros.

        Args:
            shape: of the values.
            device: of codes and scales.
            is_root: keep square roots, for values of at least 0: twice the range.
            pin: in pinned host memory.
        """
        count = shape.numel()
        codes = torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pin).zero_()
        scales = torch.empty(-(-count // FP8_BLOCK), device=device, pin_memory=pin).fill_(2.0**-126)
        return cls(codes.view(torch.float8_e4m3fn), scales, shape, is_root=is_root)

    def part(self, start: int, stop: int) -> "BlockScaled":
        """Return values `start` to `stop` of the flat tensor, which share codes and scales.

        Args:
            start: a multiple of 256.
            stop: one too, or the end.
        """
        scales = self.scales[start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
        codes, shape = self.codes[start:stop], torch.Size([stop - start])
        return BlockScaled(codes, scales, shape, is_root=self.is_root, first=self.first + start)

    def read(self) -> Tensor:
        """Return the values in fp32."""
        values = _in_blocks(self.codes.float()).mul_(self.scales[:, None]).view(-1)[: self.codes.numel()]
        return (values.square_() if self.is_root else values).view(self.shape)

    def write(self, values: Tensor, salt: int) -> None:
        """Take over values, rounded stochastically; what was read before is kept as it is.

        Args:
            values: fp32, shaped like this.
            salt: number of the update.
        """
        flat = values.reshape(-1)
        for start in range(0, flat.numel(), _WRITTEN):
            self.part(start, min(start + _WRITTEN, flat.numel()))._write(flat[start : start + _WRITTEN], salt)

    def _write(self, values: Tensor, salt: int) -> None:
        blocks = _in_blocks(values.sqrt() if self.is_root else values)
        scales = power_of_two_scale(blocks.abs().amax(dim=1))
        scaled = (blocks / scales[:, None]).view(-1)
        codes = to_e4m3(scaled, salt, first=self.first, is_root=self.is_root)
        self.scales.copy_(scales)
        # copies between fp8 tensors are not to be had on all devices
        self.codes.view(torch.uint8).copy_(codes[: self.codes.numel()].view(torch.uint8))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Read where others ask for fp32, for another device, or for memory: never hand this out as such."""
        if func in _READS:
            return func(args[0].read(), *args[1:], **(kwargs or {}))
        # torch would make results of this class otherwise
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with fp32 values; of what changes tensors in place, only copy_ and zero_ are known."""
        target = args[0] if args else None
        if isinstance(target, BlockScaled):
            if func is torch.ops.aten.detach.default:
                return target.with_parts(target.codes, target.scales)
            if func is torch.ops.aten.copy_.default:
                _copy(target, args[1])
                return target
            if func is torch.ops.aten.zero_.default:
                target.codes.view(torch.uint8).zero_()
                return target
            if func._schema.is_mutable:
                raise TypeError(f"{func}: fp8 moments cannot be changed in place; compute with .float()")
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    def __repr__(self, **_: Any) -> str:
        """Name shape and kind."""
        return f"BlockScaled(shape={tuple(self.shape)}, is_root={self.is_root})"


def _copy(target: BlockScaled, source: Tensor) -> None:
    """Round a tensor of any device into fp8, in pieces."""
    flat = _plain(source).reshape(-1)
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        stop = min(start + PIECE_ELEMENTS, flat.numel())
        values = flat[start:stop].to(target.codes.device, torch.float32)
        target.part(start, stop).write(values, salt=0)


def _plain(value: Any) -> Any:
    return value.read() if isinstance(value, BlockScaled) else value


def _in_blocks(values: Tensor) -> Tensor:
    """Cut into blocks [blocks, 256], the last one filled up with zeros."""
    missing = -values.numel() % FP8_BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, FP8_BLOCK)
