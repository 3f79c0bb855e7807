"""Output that is lost ends nothing and hides no exit code; nothing reaches a terminal raw."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.command_line import run_command
from launchers.output import SteadyStream, steady_output
from launchers.train import main

ROOT = Path(__file__).parents[2]


def lost_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")


def test_a_reader_that_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with lost_reader() as raw:
        stream = SteadyStream(raw, warning="stdout is lost")
        for _ in range(3):
            stream.write("text\n" * 10_000)
            stream.flush()
        assert stream.error is None
    assert capsys.readouterr().err == "stdout is lost (Broken pipe)\n"


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk() as raw:
        stream = SteadyStream(raw, warning="stdout is lost")
        for _ in range(3):
            print("text", file=stream, flush=True)  # type: ignore[arg-type]
        assert stream.error is not None
        assert stream.error.errno == errno.ENOSPC
        stream.drop()
    assert capsys.readouterr().err == "stdout is lost (No space left on device)\n"


def test_a_terminal_without_the_letters_and_one_that_would_obey() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = SteadyStream(raw)
    stream.write("Müller \x1b]0;t\x07\r\t\n")
    stream.flush()
    assert raw.buffer.getvalue() == b"M\\xfcller \\x1b]0;t\\x07\r\t\n"  # type: ignore[attr-defined]
    assert not stream.isatty()


@pytest.mark.parametrize(("lose", "code"), [(lost_reader, 0), (full_disk, 1)])
def test_commands_whose_output_is_all(
    lose: Callable[[], io.TextIOWrapper],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(code: int) -> int:
        print("text")
        return code

    # damage found is told by the code, whoever reads
    for run, expected in (
        (lambda: run_command("msa-x", lambda: say(0)), code),
        (lambda: run_command("msa-x", lambda: say(1)), 1),
        (lambda: main(["--version"]), code),
    ):
        with lose() as raw:
            monkeypatch.setattr(sys, "stdout", raw)
            assert run() == expected
            assert sys.stdout is raw
    told = capsys.readouterr().err
    assert ("msa-x: error: stdout cannot be written (No space left on device)\n" in told) == bool(code)


def test_one_inside_another_changes_nothing() -> None:
    before = sys.stdout
    with steady_output() as outer, steady_output() as inner:
        assert inner is outer
    assert sys.stdout is before


def test_closed_streams_are_not_given_to_the_next_file(tmp_path: Path) -> None:
    """A file that is opened as descriptor 1 would get what is printed."""
    code = (
        "from launchers.output import steady_output\n"
        "with steady_output():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    print('printed')\n"
        "    file.write(f'{file.fileno() > 2}')\n"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        timeout=60,
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "True"
