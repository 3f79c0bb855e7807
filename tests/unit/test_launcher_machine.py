"""What a machine lacks is said in one line before anything starts."""

import errno
import os
import resource
import socket
from pathlib import Path

import pytest

from launchers import machine
from launchers.checkpoint import main as checkpoint_main
from launchers.machine import accept_log_level, check_loopback, expand_user, raise_file_limit
from launchers.run_dir import write_keeping
from launchers.status import main as status_main
from launchers.train import main
from msa_train.training.stop import read_stopped


def test_a_removed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    for command in (main, checkpoint_main, status_main):
        assert command(["run=smoke"]) == 2
        assert "the current folder cannot be used" in capsys.readouterr().err


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("run_dir", "~/x") == "/home/me/x"
    assert expand_user("run_dir", "runs/~x") == "runs/~x"
    # as where HOME is unset and the user has no entry in passwd
    monkeypatch.setattr(machine.os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"^data.cache_dir=~/.cache: user id \d+ has no home folder; set"):
        expand_user("data.cache_dir", "~/.cache")


def test_files_that_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    raise_file_limit(8, on_gpu=False)
    assert limits == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(ValueError, match=r"^ulimit -n=64: a rank of 2 may have 148 .*; use ulimit -n 1024"):
        raise_file_limit(2, on_gpu=False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, resource.RLIM_INFINITY))
    raise_file_limit(256, on_gpu=True)
    assert limits[-1] == (2**20, resource.RLIM_INFINITY)


def test_loopback_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loopback()

    def unreachable(*args: object, **options: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(OSError, match=r"^lo: nothing can connect .*\(Network is unreachable\).*; bring"):
        check_loopback()


@pytest.mark.parametrize(("given", "kept"), [("info", "INFO"), ("20", "20"), ("chatty", None), ("", None)])
def test_log_level_of_another_program(given: str, kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGLEVEL", given)
    accept_log_level()
    assert os.environ.get("LOGLEVEL") == kept


def test_damaged_configuration_of_an_earlier_start_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    write_keeping(tmp_path / "config.yaml", "name: new\n")
    assert (tmp_path / "config.yaml").read_text() == "name: new\n"
    (earlier,) = tmp_path.glob("config.2*.yaml")
    assert earlier.read_bytes() == b"\xff\xfe\x00"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"step":1,"signal":"x","saved":true,"generation":""}', b"[" * 9999],
)
def test_damaged_mark_of_a_stop(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"stopped.json: (is damaged|cannot be read).*; remove it"):
        read_stopped(tmp_path)
