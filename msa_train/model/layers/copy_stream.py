"""Copy between device and host beside the computing: a stream on GPUs, plain copies elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class CopyStream:
    """Copy in order with everything else, as devices without streams do."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Make a buffer in host memory: [num_bytes] uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def behind_current(self) -> AbstractContextManager[Any]:
        """Give work to the stream, behind all that the current one has been given."""
        return nullcontext()

    def alone(self) -> AbstractContextManager[Any]:
        """Give work to the stream, beside the current one."""
        return nullcontext()

    def mark(self) -> Any:
        """Mark the work given so far."""
        return None

    def wait_for(self, mark: Any) -> None:
        """Let the current stream wait for marked work; the host goes on."""

    def use(self, tensor: Tensor, mark: Any) -> None:
        """Let the current stream use a tensor that the stream has made: it waits for the marked work."""


class CudaCopyStream(CopyStream):
    """Copy on a stream of its own, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def host_buffer(self, num_bytes: int) -> Tensor:
        """See CopyStream.host_buffer; pinned, as only then the host need not wait for a copy."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def behind_current(self) -> Iterator[None]:
        """See CopyStream.behind_current."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def alone(self) -> AbstractContextManager[Any]:
        """See CopyStream.alone."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        """See CopyStream.mark."""
        return self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        """See CopyStream.wait_for."""
        torch.cuda.current_stream().wait_event(mark)

    def use(self, tensor: Tensor, mark: Any) -> None:
        """See CopyStream.use; the tensor's memory is not given away before the current stream is done."""
        torch.cuda.current_stream().wait_event(mark)
        tensor.record_stream(torch.cuda.current_stream())


def copy_stream(device: torch.device) -> CopyStream:
    """Make the stream for a device."""
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream()
