"""Check arguments, as all operators do. Every error names the value, the rule and the way out."""

import os

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}.dtype={tensor.dtype}: must be a floating-point dtype; convert it")


def check_integer(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name}.dtype={tensor.dtype}: must be int32 or int64; convert it")


def check_int64(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold int64, as kernels that get their address take for granted."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}.dtype={tensor.dtype}: must be int64; convert it")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    assert first is not None, "the first tensor is there"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{name}.device={tensor.device}: must be that of {first_name}, {first.device}; move it there"
            )


def check_topk(topk: int, local_blocks: int) -> None:
    """Raise ValueError unless there are blocks to take, and forced ones among them."""
    if topk < 1:
        raise ValueError(f"topk={topk}: must be at least 1")
    if not 1 <= local_blocks <= topk:
        raise ValueError(f"local_blocks={local_blocks}: must be from 1 to topk={topk}")


def readable(tensor: Tensor) -> bool:
    """Decide whether a tensor's values are checked: on the CPU always, where looking costs little.

    On a device one has to wait for them; MSA_KERNELS_CHECK=1 asks for it.
    """
    return tensor.numel() > 0 and (
        tensor.device.type == "cpu" or os.environ.get("MSA_KERNELS_CHECK", "0") == "1"
    )


def check_values(name: str, tensor: Tensor, low: int, high: int, rule: str) -> None:
    """Raise ValueError where a readable integer tensor holds a value outside low..high.

    Args:
        name, rule: for the text `name=value: must be {rule}`, which should also say what to do.
        tensor: any shape; values on a device are looked at only as `readable` says.
        low, high: smallest and largest value allowed.
    """
    if not readable(tensor):
        return
    # one pass and one wait for both
    least, most = (int(value) for value in tensor.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}={least if least < low else most}: must be {rule}")


def check_cu_seqlens(cu_seqlens: Tensor, seq_len: int, block_size: int) -> None:
    """Raise ValueError unless documents begin at block boundaries, in order, from 0, and end at `seq_len`."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens.shape={tuple(cu_seqlens.shape)}: must be [num_docs + 1]; [0, S]: one document"
        )
    check_integer(cu_seqlens=cu_seqlens)
    if not readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != seq_len:
        raise ValueError(f"cu_seqlens={first}..{last}: must begin at 0 and end at S={seq_len}")
    lengths = cu_seqlens.diff()
    if int(lengths.min()) < 0:
        raise ValueError(f"cu_seqlens has a document of {int(lengths.min())} tokens: must not decrease")
    unaligned = cu_seqlens[cu_seqlens % block_size != 0]
    if unaligned.numel():
        raise ValueError(
            f"cu_seqlens={int(unaligned[0])}: must be a multiple of block_size={block_size}; pad documents "
            "to whole blocks"
        )
