"""The GPU benchmark where there is none: arguments, the plan, what is timed after which checks, the table."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from msa_kernels.select_blocks.op import select_blocks

from benchmarks.gpu import child
from benchmarks.gpu.child import Job, Worker
from benchmarks.gpu.comparison import Check
from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.ours import checks_of_attention, groups_at_once
from benchmarks.gpu.plan import SEQ_LENS, PartSpec, choose, make_plan
from benchmarks.gpu.problem import M3, SMOKE, IndexBranch, Tensors, distinct_blocks, make_index, select
from benchmarks.gpu.records import Record, Records
from benchmarks.gpu.report import load, markdown
from benchmarks.gpu.rows import GOALS, Dense, Rates, Row, verdict
from benchmarks.gpu.run_all import main
from benchmarks.gpu.selection_reference import torch_topk

SMALL = ["--device", "cpu", "--smoke"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--device=cuda: no GPU can be used here; use --device cpu --smoke"),
        (["--device", "cpu"], "--device=cpu: the sizes are a GPU's; add --smoke"),
        ([*SMALL, "--kernel", "cpu", "--seq-lens", "65"], "--seq-lens=65: must be a multiple of 16"),
        ([*SMALL, "--kernel", "cpu", "--seq-lens", "0"], "--seq-lens=0"),
        ([*SMALL, "--kernel", "cpu", "--budget-s", "0"], "--budget-s=0.0: must be above 0"),
        ([*SMALL, "--kernel", "cpu", "--parts", "256K"], "--parts=256K: must be (a piece of) one of checks-"),
        ([*SMALL, "--kernel", "triton"], "--kernel=triton: triton is not installed"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.gpu.run_all.has_triton", lambda: False)
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"run_all.py: error: {words}")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_of_other_code_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"device": "cpu", "kernel": "cpu", "smoke": True, "seed": 1, "code": "another", "gpu": ""}
    Records(tmp_path).append("run", command="", facts={}, settings=settings)
    assert main(["--out", str(tmp_path), *SMALL, "--kernel", "cpu"]) == 2
    assert "holds results with code=another" in capsys.readouterr().err


def plan() -> list[PartSpec]:
    return make_plan(SEQ_LENS, compiled=True, variants=True, flash_msa=True)


def test_plan_is_in_order_of_value() -> None:
    names = [part.name for part in plan() if part.is_timed]
    assert names[:7] == [
        *("ours-128K", "correlated-128K", "dense-128K", "decode-128K", "ours-1M", "decode-1M", "topk"),
    ]
    assert names.index("ours-32K") < names.index("dense-1M") < names.index("ours-512K")
    assert names[-2:] == ["variants-128K", "variants-1M"]
    assert all(part.beside_others for part in plan() if part.kind in ("compile", "checks"))
    assert plan()[-1].name == "rates-after"
    assert plan()[-1].reserve_s == 0.0


def test_chosen_parts_come_with_checks_and_rates() -> None:
    chosen = [part.name for part in choose(plan(), ["decode", "rates-before"])]
    assert [name for name in chosen if not name.startswith("checks-")] == [
        *("rates-before", "decode-128K", "decode-1M", "decode-32K", "decode-512K", "rates-after"),
    ]
    assert len(chosen) == 6 + 4
    assert [part.kind for part in choose(plan(), ["checks"])] == ["checks"] * 4


def worker(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[str, Step]) -> Worker:
    """A worker that makes these steps."""
    records = Records(folder)
    context = Context(records, "cpu", "cpu", 1, math.inf, smoke=True)
    monkeypatch.setattr(child, "make_part", lambda *_: type("Part", (), {"steps": lambda _: steps})())
    job = Job("", PartSpec("part", "test"), "", [], [64], "cpu", "cpu", 1, True, math.inf)
    return Worker(context, job)


@pytest.mark.parametrize(
    ("records", "needs", "why"),
    [
        ([("good", "done", {"good: out": True, "good: dq": True})], ("good",), None),
        ([("good", "done", {"good: out": True, "good: dq": False})], ("good: out",), None),
        ([("good", "done", {"good: out": True, "good: dq": False})], ("good",), "check failed: good: dq"),
        ([("good", "done", {"good: out": False})], ("good: out",), "check failed: good: out"),
        ([("good", "crashed", {"good: out": True})], ("good: out",), "check good: crashed"),
        ([("good", "done", {"good, else": True})], ("good",), "check failed: good"),
        ([], ("good",), "check good: not made"),
    ],
)
def test_nothing_is_timed_that_is_not_right(
    records: list[tuple[str, str, dict[str, bool]]],
    needs: tuple[str, ...],
    why: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    run = worker(tmp_path, monkeypatch, {"step": Step(lambda: made.append("step"), needs)})
    for case, status, checks in records:
        for name, passed in checks.items():
            run.context.add_check("group", Check(name, 0.0, 1.0 if passed else -1.0))
        run.records.append("end", part="checks-group", step=case, status=status, why="")
    assert run.run() == 0
    end = run.context.found("end")[-1]
    assert (made, end["status"], end["why"]) == (
        (["step"], "done", "") if why is None else ([], "left out", why)
    )


def test_what_fails_costs_what_depends_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fails() -> None:
        raise RuntimeError("no memory\nsecond line")

    def seconds(value: float) -> Callable[[], float]:
        return lambda: value

    steps = {
        "bad": Step(fails),
        "after it": Step(lambda: made.append("after it"), after=("bad",)),
        "too long": Step(lambda: made.append("too long"), need_s=seconds(math.inf)),
        "other": Step(lambda: made.append("other"), need_s=seconds(1e9)),
    }
    run = worker(tmp_path, monkeypatch, steps)
    run.context.clock.deadline = 1e12
    assert run.run() == 0
    assert made == ["other"]
    said = {end["step"]: (end["status"], end["why"]) for end in run.context.found("end")}
    assert said["bad"] == ("failed", "RuntimeError: no memory")
    assert said["after it"] == ("left out", "bad was not measured")
    assert said["too long"][0] == "left out"


RATES = Rates(matmul_flops=1e15, copy_bytes=2e12)


def test_a_row_is_written_again_when_its_rival_is_known(tmp_path: Path) -> None:
    context = Context(Records(tmp_path), "cpu", "cpu", 1, math.inf, smoke=True)
    context.records.append("rates", when="before", **asdict(RATES))
    context.add(Row("prefill", 64, 0.5, flops=1e14))
    context.add_dense(Dense("prefill", 64, 2.0, "cudnn", flops=1.4e15))
    context.add(Row("prefill", 64, 0.25, "correlated"))
    rows = context.found("row")
    assert [row["ratio"] for row in rows] == [None, 4.0, 8.0]
    assert rows[1]["share_of_peak"] == pytest.approx(0.2)
    assert rows[1]["rival_share"] == pytest.approx(0.7)
    assert rows[1]["counts"]
    assert context.seconds_of("prefill", 64, "correlated") == 0.25
    assert context.shorter("prefill", 128) == (64, 0.5)


def records_of(rows: list[Row], **more: Any) -> list[Record]:
    settings = {"command": "command", "facts": {"gpu": "none"}, "settings": {}}
    found = [{"kind": "run", **settings}, {"kind": "rates", "when": "before", **asdict(RATES)}]
    check = {"kind": "check", "group": "selection", "passed": True, **asdict(Check("selection", 0.0, 1.0))}
    return [*found, check, *({"kind": "row", **asdict(row.finish(RATES))} for row in rows), *more.values()]


def test_table_and_goals() -> None:
    dense = {"rival": "cudnn", "rival_flops": 6e15}
    rows = [
        Row("prefill", 2**20, 1.0, flops=5e14, peak_gib=40.0, rival_s=15.0, rival="cudnn"),
        Row("training step", 2**17, 0.5, rival_s=6.0, **dense),
        Row("training step", 2**15, 0.1, rival_s=0.1, rival="cudnn"),
        Row("training step", 2**20, 0.1, rival_s=60.0, **dense),
        Row("decode", 2**20, 1e-3, rival_s=8e-3, rival="flash", num_bytes=1e9, eager_s=2e-3),
        Row("scoring", 2**15, 1.0, flops=9e14),
        Row("scoring", 2**17, 1.0, flops=8e14, num_bytes=1.7e12, distinct=22.1),
        Row("scoring", 2**17, 1.0, "correlated", flops=9.9e14),
        Row("scoring, as shipped", 2**17, 1.0),
        Row("scoring, other tiles", 2**17, 0.5, rival_s=1.0, rival="as shipped"),
    ]
    crashed = {"kind": "end", "part": "ours-1M", "step": "sampled", "status": "crashed", "why": "SIGABRT"}
    result = load(records_of(rows, note={"kind": "note", "text": "a note"}, end=crashed))
    text = markdown(result)
    assert "| prefill | 1048576 | independent |  | 1000 | 500 | 50% | 50% | 40 | 1.5e+04 cudnn |" in text
    assert "| prefill | ratio | 1048576 | 14.2 | 20.0 | 15 | reached |" in text
    assert "| training step | ratio | 131072 | 6.0 | 10.0 | 12 | aim reached |" in text
    assert "| training step | ratio | 32768 | 1.5 | 2.5 | 1 | missed |" in text
    assert "does not count: cudnn is at 10% of its own roofline" in text
    assert "| 100 |  |  |  |  | 6e+04 cudnn | 100 | 10% | (600) |" in text
    assert "| scoring | share_of_roofline | 131072 | 0.75 | 0.9 | 0.85 | reached |" in text
    assert "1 (from Python 2)" in text
    assert "| scoring, other tiles | 131072 | 500 | 2 |" in text
    assert "- a note" in text
    assert "- not measured: ours-1M, sampled: crashed: SIGABRT" in text
    assert result.correct
    assert verdict(GOALS[0], [])["verdict"] == "not measured"


def test_checks_that_failed_or_crashed_are_said_first() -> None:
    wrong = {"kind": "check", "group": "attention", "passed": False, "name": "attention: dq", "error": None}
    end = {"kind": "end", "part": "checks-decode", "step": "decode", "status": "crashed", "why": "SIGABRT"}
    result = load(records_of([], wrong=wrong | {"allowed": 1.0, "text": ""}, end=end))
    text = markdown(result)
    assert not result.correct
    assert text.index("A CHECK FAILED") < text.index("| check |")
    assert "| attention: dq | nan | 1 | FAILED |" in text
    assert "| decode | nan | 0 | FAILED SIGABRT |" in text
    assert result.as_json()["checks"][1]["error"] is None


def test_topk_of_scores_in_memory_selects_the_same() -> None:
    index = make_index(Tensors(torch.device("cpu"), torch.float64, 5), SMOKE, 256)
    want = select_blocks(index.q, index.k, torch.tensor([0, 256]), block_size=16, topk=2)
    for count in (None, 100):
        got = torch_topk(index, SMOKE, count)
        got = got.masked_fill(got < 0, 99).sort(-1).values
        assert torch.equal(got.masked_fill(got == 99, -1), want[-len(got) :])
        assert torch.equal(select(index, SMOKE, "cpu", count), want[-len(got) :])


def test_correlated_selections_have_much_in_common() -> None:
    ids = torch.tensor([[0, 3], [0, 5], [2, -1], [2, 3]])[:, None]
    assert distinct_blocks(ids, neighbours=2) == 2.5
    tensors, found = Tensors(torch.device("cpu"), torch.float32, 5), {}
    for selection in ("independent", "correlated"):
        index = make_index(tensors, M3, 2**14, selection)
        last = IndexBranch(index.q[:, :1], index.k)
        found[selection] = distinct_blocks(select(last, M3, "cpu", 256))
    # of 64 slots; a trained model: 22.1
    assert found["independent"] > 45
    assert 19 < found["correlated"] < 25


def test_work_of_m3() -> None:
    # 1M tokens, 4 groups, 2 x 128 operations for half of all pairs
    assert M3.scoring_flops(2**20) == 4 * 128 * 2.0**40
    # the last 1,024 queries see nearly everything
    assert M3.scoring_flops(2**17, 1024) == 2 * 128 * 4 * 1024 * (2**17 - 512)
    assert M3.dense_flops(2**20) == 2 * 64 * 128 * 2.0**40
    # 16 heads, two products of 128 x 128 of one query with one block
    assert M3.pair_flops() == 16 * 2 * 2 * 128 * 128
    assert M3.decode_bytes(2**20, 2) == 2 * (2**20 * 128 + 4 * 16 * 128 * 2 * 128)
    assert M3.decode_bytes(2**20, 2, 132) == 2**20 * 132 + 2 * 4 * 16 * 128 * 2 * 128
    # a partial output of 4 KiB, written and read, and a 16th of q and of the output
    assert M3.forward_bytes(16, 2) == 16 * 8192 + 2 * 4096
    assert [groups_at_once(M3, 2**n, 2**31) for n in (15, 17, 19, 20)] == [4, 4, 2, 1]
    assert checks_of_attention(1, backward=False)[-1] == "attention, one group: out"
