"""Lets Megatron's GPU-only glue (DDP, distributed optimizer, pipeline schedules) run on gloo. Tests only.

It pretends: `device="cuda"` becomes the CPU, streams and events do nothing. That is enough to see that our
engine calls Megatron rightly and that the numbers agree; it says nothing about streams, races or speed. Never
import it outside tests. Refused is what gives wrong numbers: freeing pipeline outputs before gloo has sent
them, and messages of an interleaved pipeline in one batch. With two stages both neighbours are one rank,
which takes an activation for a gradient; so it is on GPUs too, and Megatron's own scripts refuse it.
"""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NoStream:
    """Stands for streams and events: every method does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_error: object) -> None:
        pass


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


class CudaOnCpu(TorchFunctionMode):
    """Sends CUDA placements of torch functions to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer recognises parameters by "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def install() -> None:
    """Patch torch.cuda for the rest of this process."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_args, **_kwargs: None)
    for name in ("Stream", "Event"):
        setattr(cuda, name, _NoStream)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_args, **_kwargs: _NoStream())
    cuda.stream = lambda *_args, **_kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    CudaOnCpu().__enter__()


def refuse_wrong_corners(config: Any) -> None:
    """Raise where the numbers are known to be wrong, by Megatron's TransformerConfig."""
    if config.virtual_pipeline_model_parallel_size is not None and config.batch_p2p_comm:
        raise NotImplementedError("an interleaved pipeline gives wrong numbers with batch_p2p_comm")
    if config.deallocate_pipeline_outputs:
        raise NotImplementedError("the shim frees pipeline outputs before gloo has sent them")
