"""Nodes that look at themselves and at each other before training; several nodes are threads here."""

import threading
import time
from pathlib import Path

import pytest

from launchers.node_check import BAD_NODES, main
from launchers.node_facts import Facts, Wanted, complaints, gather_facts
from launchers.node_links import Head, answer_head, slow_nodes

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
    head = Head(0, 4)
    port = head._server.getsockname()[1]
    told: dict[int, bool] = {}

    def node(rank: int) -> None:
        told[rank] = answer_head("127.0.0.1", port, rank, facts(gpus=rank), timeout_s=20)

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
    head = Head(0, 2)
    port = head._server.getsockname()[1]
    head._server.close()
    start = time.monotonic()
    with pytest.raises(OSError):
        answer_head("127.0.0.1", port, 1, facts(), timeout_s=0.5)
    assert time.monotonic() - start < 20


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
