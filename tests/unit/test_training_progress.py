"""What the user sees while a run trains."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from msa_train.config import Progress as ProgressKind
from msa_train.training.metrics.progress import Progress, format_count, format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_line_holds_everything_known() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(ProgressKind.lines, 400, 118, stream, clock=clock)
    progress.update(119, dict(lm_loss=2.5, tokens_per_s=8000))
    clock.now = 10.0
    progress.update(
        120,
        dict(
            lm_loss=2.3123,
            tokens_per_s=8100,
            kl_loss=0.12,
            grad_norm=0.9,
            lr=3.9e-3,
            tokens=5,
            memory_gib=1.5,
        ),
    )
    first, second = stream.getvalue().splitlines()
    assert first == "step 119/400  lm_loss 2.5  8.0K tok/s"
    assert second == "step 120/400  lm_loss 2.312  kl 0.12  grad 0.9  lr 3.9e-03  8.1K tok/s  left 46m40s"


def test_lines_are_few_but_first_last_and_validations_are_there() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(ProgressKind.lines, 100, 0, stream, clock=clock)
    for step in range(1, 101):
        clock.now += 0.5
        progress.update(step, dict(lm_loss=1.0, tokens_per_s=10, val_loss=0.5 if step == 9 else None))
    progress.close()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in stream.getvalue().splitlines()]
    assert steps[:4] == [1, 7, 9, 15]
    assert steps[-1] == 100
    assert len(steps) < 22


def test_close_shows_the_last_step_of_an_interrupted_run() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(ProgressKind.lines, 100, 0, stream, clock=clock)
    for step in (1, 2, 3):
        progress.update(step, dict(lm_loss=1.0, tokens_per_s=10))
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "3/100"]


def test_time_left_does_not_count_the_slow_start() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(ProgressKind.lines, 10, 0, stream, clock=clock)
    clock.now = 300.0
    progress.update(1, dict(lm_loss=1.0, tokens_per_s=10))
    for step in range(2, 9):
        clock.now += 5.0
        progress.update(step, dict(lm_loss=1.0, tokens_per_s=10))
    assert stream.getvalue().splitlines()[-1].endswith("left 10s")


def test_steps_may_be_logged_rarely() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(ProgressKind.lines, 100, 0, stream, clock=clock)
    for step in (10, 20):
        clock.now += 20.0
        progress.update(step, dict(lm_loss=1.0, tokens_per_s=10))
    assert stream.getvalue().splitlines()[-1].endswith("left 2m40s")


@pytest.mark.parametrize(
    ("kind", "stream", "as_bar"),
    [
        (ProgressKind.auto, Terminal(), True),
        (ProgressKind.auto, io.StringIO(), False),
        (ProgressKind.bar, io.StringIO(), True),
        (ProgressKind.lines, Terminal(), False),
    ],
    ids=["auto_terminal", "auto_file", "bar_file", "lines_terminal"],
)
def test_bar_or_lines(kind: ProgressKind, stream: io.StringIO, as_bar: bool) -> None:
    progress = Progress(kind, 4, 1, stream)
    progress.update(2, dict(lm_loss=2.25, tokens_per_s=10))
    progress.note("checkpoint step 2 written in 0.1 s")
    progress.update(4, dict(lm_loss=1.25, tokens_per_s=10, val_loss=1.5))
    progress.close()
    text = stream.getvalue()
    assert ("\r" in text) is as_bar
    assert "lm_loss 1.25" in text
    lines = [line.split("\r")[-1] for line in text.splitlines()]
    assert "checkpoint step 2 written in 0.1 s" in lines
    if as_bar:
        assert "step 4/4  val_loss 1.5" in lines
        assert "4/4" in lines[-1]
        assert "100%" in lines[-1]


def read_to_the_end(screen: io.FileIO) -> bytes:
    """All that a terminal got; it comes in pieces, and ends with an error once nobody writes to it."""
    pieces: list[bytes] = []
    while True:
        try:
            piece = screen.read(10_000)
        except OSError:
            return b"".join(pieces)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


@pytest.mark.parametrize(("rows", "columns", "as_bar"), [(24, 80, True), (0, 0, False)])
def test_a_terminal_without_size_gets_lines(rows: int, columns: int, as_bar: bool) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(leader, "rb", buffering=0) as screen:
        with os.fdopen(follower, "w") as stream:
            progress = Progress(ProgressKind.auto, 4, 0, stream)
            progress.update(4, dict(lm_loss=1.25, tokens_per_s=10))
            progress.close()
        shown = read_to_the_end(screen).decode()
    assert ("100%" in shown) is as_bar
    assert ("step 4/4  lm_loss 1.25" in shown) is not as_bar


def test_counts_and_durations() -> None:
    counts = [0.4, 950.2, 999.7, 8123, 99_960, 999_600, 1.25e6, 2e9]
    assert [format_count(n) for n in counts] == ["0", "950", "1.0K", "8.1K", "100K", "1.0M", "1.2M", "2.0G"]
    seconds = [0.2, 45, 59.6, 220, 3599.7, 7500, 97200]
    assert [format_duration(s) for s in seconds] == ["0s", "45s", "1m00s", "3m40s", "1h00m", "2h05m", "1d03h"]
