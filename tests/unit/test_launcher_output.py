"""Output that is lost ends nothing and hides no exit code; nothing reaches a terminal raw."""

import ast
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.checkpoint import main as checkpoint_main
from launchers.cli.command_line import run_command
from launchers.cli.output import SteadyStream, steady_output
from launchers.status import main as status_main
from launchers.train import main
from msa_train.training.metrics.tables import format_table

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
        "from launchers.cli.output import steady_output\n"
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


def test_nothing_is_printed_unescaped() -> None:
    """Every print() goes through `printable`, which `say` does for the commands."""
    found = []
    for path in [*(ROOT / "launchers").glob("*.py"), *(ROOT / "msa_train").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Name)
                or node.func.id != "print"
            ):
                continue
            (text,) = node.args
            escaped = isinstance(text, ast.Call) and getattr(text.func, "id", "") == "printable"
            if not escaped and not (path.name == "output.py" and getattr(text, "id", "") == "shown"):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_names_and_errors_cannot_act_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]0;t\x07\nkept: 9"
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").write_text("[]")
    for command in (
        lambda: checkpoint_main(["verify", str(tmp_path / name)]),
        lambda: checkpoint_main(["ls", str(tmp_path / name)]),
        lambda: checkpoint_main(["verify", str(tmp_path / f"{name}x")]),
        lambda: status_main([str(tmp_path / f"{name}x")]),
        lambda: main([f"run={name}"]),
        lambda: main([f"--{name}"]),
    ):
        assert command() in (0, 1, 2)
        told = capsys.readouterr()
        text = told.out + told.err
        assert "\x1b" not in text
        assert "\nkept: 9" not in text, text
        assert text.isprintable() or set(text) - set("\n") == set(filter(str.isprintable, text)), text
    assert "\\x1b" in format_table([("node", "\x1b[2J")])
