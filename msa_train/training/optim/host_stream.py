"""Bring tensors from pinned host memory to the device, have them changed, and take them back, overlapped.

Three transfers are under way: one comes, one is being changed, one goes back. On GPUs each direction has a
stream of its own, so that both directions of the link are used at once; on the CPU the same copies are made
one after another.

By arithmetic, for the 1.7B parameters that a rank of m3 on 256 ranks updates, all states on the host: 12
bytes each way are 20 GB, 0.4 s a step at 50 GB/s. Two ranks that share a link take twice that.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msa_train.config.optimizer_bytes import STREAM_SLOTS

Change = Callable[[int, list[Tensor]], None]


class HostStream:
    """Stream groups of host tensors through the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        is_gpu = device.type == "cuda"
        self._incoming = torch.cuda.Stream(device) if is_gpu else None
        self._outgoing = torch.cuda.Stream(device) if is_gpu else None

    def run(self, groups: Sequence[list[Tensor]], change: Change) -> None:
        """Have all groups changed; returns when the host has the results.

        The device holds three groups of the largest size at a time.

        Args:
            groups: flat tensors on the host, as many and of the same dtypes in each.
            change: called with the number of a group and its copies on the device, which it changes in place.
        """
        if not groups:
            return
        places = self._make_places(groups)
        copies: list[list[Tensor]] = []
        events = _Events(self._incoming, self._outgoing)
        # what is read on the device was queued by others before
        events.outgoing_follows_current()
        for number in range(len(groups) + 1):
            if number < len(groups):
                place = places[number % STREAM_SLOTS]
                copies.append([part[: t.numel()] for part, t in zip(place, groups[number], strict=True)])
                with events.incoming(number, after_sent=number - STREAM_SLOTS):
                    _copy_all(copies[number], groups[number])
            # one group later than its transfer was begun, which goes on under the change of the one before
            done = number - 1
            if done >= 0:
                events.wait_for(done)
                change(done, copies[done])
                with events.outgoing(done):
                    _copy_all(groups[done], copies[done])
                copies[done] = []
        events.finish()

    def _make_places(self, groups: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """Make the places on the device that groups take in turn."""
        largest = [max(group[role].numel() for group in groups) for role in range(len(groups[0]))]
        return [
            [
                torch.empty(count, dtype=tensor.dtype, device=self.device)
                for count, tensor in zip(largest, groups[0], strict=True)
            ]
            for _ in range(min(STREAM_SLOTS, len(groups)))
        ]


class _Events:
    """Order the two streams of transfers and the stream of the computation; nothing on the CPU."""

    def __init__(self, incoming: torch.cuda.Stream | None, outgoing: torch.cuda.Stream | None) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._received: dict[int, torch.cuda.Event] = {}
        self._sent: dict[int, torch.cuda.Event] = {}

    def outgoing_follows_current(self) -> None:
        if self._incoming is not None and self._outgoing is not None:
            current = torch.cuda.current_stream(self._incoming.device)
            self._incoming.wait_stream(current)
            self._outgoing.wait_stream(current)

    def incoming(self, number: int, *, after_sent: int) -> "_On":
        """Copy to the device, once the group that was in the place before has been sent back."""
        if self._incoming is not None and after_sent in self._sent:
            self._incoming.wait_event(self._sent.pop(after_sent))
        return _On(self._incoming, self._received, number)

    def wait_for(self, number: int) -> None:
        if self._incoming is not None:
            torch.cuda.current_stream(self._incoming.device).wait_event(self._received.pop(number))

    def outgoing(self, number: int) -> "_On":
        """Copy to the host, once the computation so far is done."""
        if self._outgoing is not None:
            self._outgoing.wait_stream(torch.cuda.current_stream(self._outgoing.device))
        return _On(self._outgoing, self._sent, number)

    def finish(self) -> None:
        """Wait until the host has everything: it may be read there next, by a checkpoint."""
        if self._outgoing is not None:
            torch.cuda.current_stream(self._outgoing.device).wait_stream(self._outgoing)
            self._outgoing.synchronize()


class _On:
    """Run on a stream and leave an event there; on the CPU do neither."""

    def __init__(
        self, stream: torch.cuda.Stream | None, events: dict[int, torch.cuda.Event], number: int
    ) -> None:
        self._context = torch.cuda.stream(stream) if stream is not None else None
        self._stream, self._events, self._number = stream, events, number

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._context is not None and self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
            self._events[self._number] = event
            self._context.__exit__(*error)


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        # fp8 codes go as bytes
        target.copy_(source, non_blocking=True)
