"""Run work beside the main stream of a GPU: on a CPU it runs where it stands.

On a GPU kernels of one stream run one after the other. What an exchange needs beside the scoring of blocks
(requests, index lists, rows to send) must not queue behind that scoring, so it has a stream of its own.
Never run on a GPU by the project's own tests; its order of calls is tested with stand-ins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def mark(device: torch.device) -> "torch.cuda.Event | None":
    """Mark the point that the current stream has come to; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextmanager
def beside(device: torch.device, after: "torch.cuda.Event | None") -> Iterator[None]:
    """Launch what is in the block on the side stream, to run after a mark of the main one."""
    if device.type != "cuda" or after is None:
        yield
        return
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side = _streams[device]
    side.wait_event(after)
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """Let the current stream go on after everything that was launched beside it."""
    if device in _streams:
        torch.cuda.current_stream(device).wait_stream(_streams[device])
