"""Children of the GPU benchmark that die, hang or never begin: what they cost, and what stays."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.plan import PartSpec
from benchmarks.gpu.records import Record, Records
from benchmarks.gpu.supervise import ROOT, Supervisor, child_environment

# A child of three steps; what it does in the second is its part's kind.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.records import Records
line = sys.stdin.readline()
if not line:
    sys.exit(0)
job = json.loads(line)
records, kind = Records(Path(job["folder"])), job["part"]["kind"]
if kind == "import error":
    sys.exit("no such module")
for step in ("first", "second", "third"):
    if step in job["skip"]:
        continue
    records.append("begin", part=job["part"]["name"], step=step)
    if step == "second":
        if kind == "abort":
            os.abort()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(60)
        if kind == "half a line":
            with records.path.open("a") as file:
                file.write('{"kind": "row", "wh')
            os.kill(os.getpid(), signal.SIGKILL)
    records.append("row", part=job["part"]["name"], step=step)
    broken = kind == "broken device" and step == "second"
    records.append("end", part=job["part"]["name"], step=step, status="failed" if broken else "done", why="")
    if broken:
        sys.exit(70)
records.append("part", part=job["part"]["name"])
"""


class Run:
    """A supervisor of such children."""

    def __init__(self, folder: Path, seconds: float = 60.0, at_once: int = 2) -> None:
        self.records, self.heard = Records(folder), []
        script = folder / "fake_child.py"
        script.write_text(CHILD)
        self.supervisor = Supervisor(
            self.records, folder, [sys.executable, str(script)], self.job_of, child_environment("cpu", "cpu"),
            self.heard.append, time.monotonic() + seconds, most_at_once=at_once,
        )  # fmt: skip
        self.folder = folder
        self.heard: list[Record]

    def job_of(self, part: PartSpec, skip: list[str]) -> dict[str, Any]:
        return {"folder": str(self.folder), "part": part.as_json(), "skip": skip}

    def made(self) -> list[tuple[str, str]]:
        """Part and step of every row."""
        return [(row["part"], row["step"]) for row in self.records.read() if row["kind"] == "row"]

    def crashed(self) -> dict[tuple[str, str], str]:
        """Why, by part and step."""
        ends = [record for record in self.records.read() if record["kind"] == "end"]
        return {(end["part"], end["step"]): end["why"] for end in ends if end["status"] == "crashed"}


def part(name: str, kind: str, **fields: Any) -> PartSpec:
    return PartSpec(name, kind, reserve_s=0.0, **fields)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("abort", "ended by SIGABRT"),
        ("kill", "ended by SIGKILL"),
        ("half a line", "ended by SIGKILL"),
        ("hang", "no end after 1 s"),
    ],
)
def test_a_bad_end_costs_one_step(kind: str, why: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.supervisor.run([part("bad", kind, limit_s=1.0), part("good", "well")], {})
    steps = ("first", "second", "third")
    assert run.made() == [("bad", "first"), ("bad", "third"), *(("good", step) for step in steps)]
    (key, said), *others = run.crashed().items()
    assert key == ("bad", "second")
    assert said.startswith(why)
    assert not others
    assert [record["step"] for record in run.heard if record["kind"] == "row"] == [s for _, s in run.made()]


def test_a_broken_device_is_given_another_process(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.supervisor.run([part("bad", "broken device")], {})
    assert [step for _, step in run.made()] == ["first", "second", "third"]
    assert run.crashed() == {}


def test_what_cannot_begin_is_given_up(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.supervisor.run([part("bad", "import error"), part("good", "well")], {})
    assert len(run.made()) == 3
    notes = [record["text"] for record in run.records.read() if record["kind"] == "note"]
    assert notes == ["bad: not begun, exit code 1; standby.log: no such module"]


def test_parts_beside_others_come_first_and_together(tmp_path: Path) -> None:
    run = Run(tmp_path)
    together = [part(f"check{i}", "well", beside_others=True) for i in range(5)]
    assert run.supervisor.run([part("timed", "well"), *together], {"check3": ["first", "second"]})
    rows = run.made()
    assert rows[-3:] == [("timed", step) for step in ("first", "second", "third")]
    assert len(rows) == 3 + 4 * 3 + 1
    assert ("check3", "third") in rows


def test_time_that_is_up_leaves_the_rest_out(tmp_path: Path) -> None:
    run = Run(tmp_path, seconds=2.0)
    begin = time.monotonic()
    assert not run.supervisor.run([part("bad", "hang", limit_s=60.0), part("good", "well")], {})
    assert time.monotonic() - begin < 30
    assert ("bad", "first") in run.made()
    assert not any(name == "good" for name, _ in run.made())
    ends = [(end["step"], end["status"]) for end in run.records.read() if end["kind"] == "end"]
    assert ends == [("first", "done"), ("second", "left out")]
    notes = [record["text"] for record in run.records.read() if record["kind"] == "note"]
    assert notes == ["good: left out, the time is up"]


def test_records_of_many_writers_are_whole(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.append("row", value=float("nan"), list=[1.0, float("inf")])
    with records.path.open("a") as file:
        file.write('{"kind": "ro')
    records.append("note", text="after half a line")
    with records.path.open("a") as file:
        file.write("[]\nnot json\n")
    assert records.read() == [
        {"kind": "row", "value": None, "list": [1.0, None]},
        {"kind": "note", "text": "after half a line"},
    ]
    assert Records(tmp_path / "nowhere").read() == []
    assert (ROOT / "benchmarks/gpu/child.py").exists()
