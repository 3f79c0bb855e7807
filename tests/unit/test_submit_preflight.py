"""Nodes that look at themselves and at each other before training; several nodes are threads here."""

import json
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launchers.preflight import BAD_NODES, _name, find_place, main
from launchers.slurm.job_token import read_token, sign, token_path
from launchers.slurm.node_facts import Facts, Wanted, complaints, gather_facts
from launchers.slurm.node_links import Head, Link, answer_head, slow_nodes

TOKEN = b"0" * 64
GOOD = {"gpus": 8, "cpus": 64, "memory_gb": 500.0, "write_s": 0.1, "write_error": ""}


def facts(**changes: object) -> Facts:
    return Facts(node="n", **{**GOOD, **changes})  # type: ignore[arg-type]


def test_a_good_node_and_what_can_be_wrong() -> None:
    wanted = Wanted(gpus=8, cpus=64, memory_gb=400)
    assert complaints(facts(), wanted, clock_s=0.5) == []
    assert complaints(facts(gpus=7), wanted, 0.0) == ["7 GPUs instead of 8"]
    assert complaints(facts(cpus=32), wanted, 0.0) == ["32 CPUs instead of 64"]
    assert complaints(facts(memory_gb=3.0), wanted, 0.0) == ["3.0 GB of memory are free instead of 400"]
    assert complaints(facts(), wanted, clock_s=-70.0) == ["its clock is off by -70.0 s"]
    assert complaints(facts(write_error="Read-only file system: /x"), wanted, 0.0) == [
        "run_dir cannot be written: Read-only file system: /x"
    ]


def test_facts_of_this_machine(tmp_path: Path) -> None:
    found = gather_facts(str(tmp_path), count_gpus=False, timeout_s=30)
    assert found.cpus >= 1
    assert found.memory_gb > 0
    assert found.write_error == ""
    assert list(tmp_path.iterdir()) == []
    missing = gather_facts(str(tmp_path / "missing"), count_gpus=False, timeout_s=30)
    assert missing.write_error == f"No such file or directory: {tmp_path / 'missing'}"


def test_slow_link_stands_out_among_three() -> None:
    assert slow_nodes({"a": 0.01, "b": 0.012, "c": 0.2}, 4) == ["c"]
    assert slow_nodes({"a": 0.01, "b": 0.2}, 4) == []
    # microseconds of noise
    assert slow_nodes({"a": 1e-5, "b": 1e-5, "c": 1e-3}, 4) == []


def test_head_hears_all_that_answer_and_misses_the_silent() -> None:
    head = Head(0, 4, TOKEN)
    port = head._server.getsockname()[1]
    told: dict[int, bool] = {}

    def node(rank: int) -> None:
        told[rank] = answer_head("127.0.0.1", port, rank, facts(gpus=rank), TOKEN, timeout_s=20)

    # rank 3 never starts
    threads = [threading.Thread(target=node, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    answers = head.ask_all(timeout_s=3)
    head.tell_all(go_on=False)
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [1, 2]
    assert answers[2].facts.gpus == 2
    assert abs(answers[1].clock_s) < 1
    assert 0 < answers[1].echo_s < 3
    assert told == {1: False, 2: False}


def test_node_without_a_first_one_gives_up() -> None:
    head = Head(0, 2, TOKEN)
    port = head._server.getsockname()[1]
    head.close()
    start = time.monotonic()
    with pytest.raises(OSError):
        answer_head("127.0.0.1", port, 1, facts(), TOKEN, timeout_s=0.5)
    assert time.monotonic() - start < 20


def greet(port: int, token: bytes, content: object) -> socket.socket:
    """A stranger's connection, with what it says signed by its token."""
    connection = socket.create_connection(("127.0.0.1", port))
    challenge = Link(connection, 20).read_line()
    hello = json.dumps(content).encode()
    connection.sendall(f"{sign(token, b'hello', challenge, hello)} ".encode() + hello + b"\n")
    return connection


def test_strangers_keep_nobody_waiting_and_are_not_believed() -> None:
    head = Head(0, 3, TOKEN)
    port = head._server.getsockname()[1]
    mine = {**GOOD, "node": "n", "gpus": 0}
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for connection, said in zip(
        connections[2:], (b"{", b"{}\n", b"[1]\n", b"\xff\n", b"[" * 9999 + b"\n"), strict=False
    ):
        connection.sendall(said)
    connections.append(greet(port, b"1" * 64, {"rank": 1, "facts": mine, "challenge": "x"}))
    told: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda rank=rank: told.append(answer_head("127.0.0.1", port, rank, facts(), TOKEN, 20)),
            daemon=True,
        )
        for rank in (1, 2)
    ]
    for thread in threads:
        thread.start()
    answers = head.ask_all(timeout_s=20)
    head.tell_all(go_on=True)
    for thread in threads:
        thread.join(20)
    assert {rank: answer.facts.gpus for rank, answer in answers.items()} == {1: 8, 2: 8}
    assert told == [True, True]
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    "content",
    [
        {"rank": 77, "facts": {**GOOD, "node": "n"}, "challenge": "x"},
        {"rank": 0, "facts": {**GOOD, "node": "n"}, "challenge": "x"},
        {"rank": True, "facts": {**GOOD, "node": "n"}, "challenge": "x"},
        {"rank": 1, "facts": {**GOOD, "node": "n"}},
        {"rank": 1, "facts": {"x": 1}, "challenge": "x"},
        {"rank": 1, "facts": {**GOOD, "node": "n", "gpus": "8"}, "challenge": "x"},
        {"rank": 1, "facts": {**GOOD, "node": "n", "memory_gb": float("nan")}, "challenge": "x"},
        [1],
        {},
    ],
)
def test_odd_words_of_a_node_bring_nobody_down(content: object) -> None:
    head = Head(0, 2, TOKEN)
    with greet(head._server.getsockname()[1], TOKEN, content) as connection:
        # it is refused, and the first node is still there
        assert connection.recv(1) == b""
    assert head.ask_all(timeout_s=0.01) == {}
    head.close()


def test_a_node_does_not_believe_a_false_first_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def play_the_first() -> None:
            connection, _ = server.accept()
            connection.sendall(b"challenge\n")
            Link(connection, 20).read_line()
            connection.sendall(b"go on " + b"0" * 64 + b"\n")

        threading.Thread(target=play_the_first, daemon=True).start()
        with pytest.raises(ConnectionError, match="does not belong to this job"):
            answer_head("127.0.0.1", server.getsockname()[1], 1, facts(), TOKEN, timeout_s=20)


def test_token_is_made_once_and_must_be_private(tmp_path: Path) -> None:
    path = token_path(tmp_path, "7.0")
    with pytest.raises(FileNotFoundError):
        read_token(path, create=False, timeout_s=0)
    token = read_token(path, create=True, timeout_s=0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path, create=True, timeout_s=0) == token
    assert len(token) == 64
    path.chmod(0o640)
    with pytest.raises(ValueError, match="readable by you alone"):
        read_token(path, create=False, timeout_s=0)


def test_what_a_node_says_adds_no_line_to_the_bad_nodes(tmp_path: Path) -> None:
    _name(tmp_path, ["gpu01: run_dir cannot be written: \x1b]0;x\x07\nnode99: y"])
    (line,) = (tmp_path / BAD_NODES).read_text().splitlines()
    assert line == r"gpu01: run_dir cannot be written: \x1b]0;x\x07\nnode99: y"


def test_command_names_a_bad_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert main([f"--run-dir={tmp_path}"]) == 0
    assert not (tmp_path / BAD_NODES).exists()
    assert main([f"--run-dir={tmp_path}", "--cpus=100000"]) == 1
    captured = capsys.readouterr()
    line = (tmp_path / BAD_NODES).read_text().strip()
    assert f"msa-preflight: 1 of 1 nodes are bad: {line}\n" in captured.err
    assert "CPUs instead of 100000" in captured.err


def test_nodes_behind_one_that_hangs_are_not_called_silent() -> None:
    """One that proves itself and says no more uses up the time of all; who came in time is measured after."""
    head = Head(0, 3, TOKEN)
    port = head._server.getsockname()[1]
    hello = {"rank": 1, "facts": asdict(facts()), "challenge": "0"}
    with greet(port, TOKEN, hello):
        deadline = time.monotonic() + 20
        while head._proved.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        node = threading.Thread(
            target=answer_head,
            args=("127.0.0.1", port, 2, facts(), TOKEN),
            kwargs={"timeout_s": 20},
            daemon=True,
        )
        node.start()
        answers = head.ask_all(timeout_s=1.0)
        head.tell_all(go_on=True)
    node.join(20)
    assert sorted(answers) == [2]


def test_a_step_without_its_nodes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST=: is empty"):
        find_place()
