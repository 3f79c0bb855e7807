"""Bringing what the host has computed to a device without waiting for it."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The host tensor x on `device`, for everything that is launched there from now on.

    From ordinary memory a copy holds the host up until the GPU has done all that came before, so that it can
    launch nothing ahead; from pinned memory it does not. torch keeps the pinned copy until it has been read.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
