"""Transfers between host and device: order of both streams and the computation, by streams that count."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from msa_train.config.optimizer_bytes import STREAM_SLOTS
from msa_train.training.optim import host_stream

Clock = dict[int, int]


class FakeStream:
    """Knows what happens before its next operation: how far every stream is, as far as it was waited for."""

    current: "FakeStream"
    waited_by_host: ClassVar[set[int]] = set()

    def __init__(self, device: object = None) -> None:
        self.device = torch.device("cpu")
        self.clock: Clock = {id(self): 0}

    def tick(self) -> Clock:
        self.clock[id(self)] += 1
        return dict(self.clock)

    def _join(self, other: Clock) -> None:
        for key, value in other.items():
            self.clock[key] = max(self.clock.get(key, 0), value)

    def wait_stream(self, other: "FakeStream") -> None:
        self._join(other.clock)

    def wait_event(self, event: "FakeEvent") -> None:
        self._join(event.clock)

    def synchronize(self) -> None:
        FakeStream.waited_by_host.add(id(self))


class FakeEvent:
    clock: Clock

    def record(self, stream: FakeStream) -> None:
        self.clock = dict(stream.clock)


@contextmanager
def on_stream(stream: FakeStream) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


def is_before(first: tuple[FakeStream, Clock], second: tuple[FakeStream, Clock]) -> bool:
    """Whether the first operation is sure to be done when the second one begins."""
    stream, clock = first
    return second[1].get(id(stream), 0) >= clock[id(stream)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_each_transfer_waits_for_what_it_needs_and_no_more(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeStream.current = computing = FakeStream()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: FakeStream.current)
    stream = host_stream.HostStream(torch.device("cpu"))
    incoming, outgoing = FakeStream(), FakeStream()
    stream._incoming, stream._outgoing = incoming, outgoing  # type: ignore[assignment]
    seen: dict[str, list[tuple[FakeStream, Clock]]] = {"in": [], "change": [], "out": []}
    copied = host_stream._copy_all

    def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
        kind = {id(incoming): "in", id(outgoing): "out"}[id(FakeStream.current)]
        seen[kind].append((FakeStream.current, FakeStream.current.tick()))
        copied(targets, sources)

    def change(number: int, copies: list[Tensor]) -> None:
        seen["change"].append((FakeStream.current, FakeStream.current.tick()))
        copies[0] += number

    monkeypatch.setattr(host_stream, "_copy_all", copy)
    groups: list[list[Any]] = [[torch.zeros(4)] for _ in range(count)]
    stream.run(groups, change)
    assert [group[0][0].item() for group in groups] == list(range(count))
    for n in range(count):
        assert is_before(seen["in"][n], seen["change"][n])
        assert is_before(seen["change"][n], seen["out"][n])
        if n + STREAM_SLOTS < count:
            # the place is free again
            assert is_before(seen["out"][n], seen["in"][n + STREAM_SLOTS])
        if n + 1 < count:
            # overlap: the next one comes under this one's change and does not wait for its way back
            assert not is_before(seen["change"][n], seen["in"][n + 1])
            assert not is_before(seen["out"][n], seen["change"][n + 1])
    assert id(outgoing) in FakeStream.waited_by_host
    assert is_before(seen["out"][-1], (computing, computing.tick()))
