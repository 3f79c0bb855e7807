"""Figures of the fp8 benchmark, against selections done by hand."""

import pytest
import torch

from benchmarks.fp8_index_keys.cases import Case, Pack
from benchmarks.fp8_index_keys.report import markdown
from benchmarks.fp8_index_keys.run import main

# blocks of 2, three of 4 taken; the query at position 7 has block 3 forced
SCORES = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.0, 5.0, 5.0])


def test_figures_by_hand() -> None:
    pack = Pack(q=torch.ones(1, 1, 1), k=SCORES[:, None], position=torch.tensor([7]))
    case = Case("here", "by hand", [pack], block_size=2, topk=3)
    exact = case.select(pack, pack.k)
    assert exact.tolist() == [[[0, 1, 3]]]
    other = case.select(pack, torch.tensor([3.0, 0, 1, 0, 2, 0, 5, 5])[:, None])
    assert other.tolist() == [[[0, 2, 3]]]
    found = case.compare(pack, exact, other)
    assert found["blocks"].tolist() == [[0.5]]
    p = SCORES.softmax(0).view(4, 2).sum(1)
    assert found["student"].item() == pytest.approx(float((p[0] + p[2] + p[3]) / (p[0] + p[1] + p[3])))
    pack.attention = torch.tensor([[[0.5, 0.25, 0.0, 0.25]]])
    assert case.compare(pack, exact, other)["attention"].tolist() == [[0.75]]
    assert all((x == 1).all() for x in case.compare(pack, exact, exact).values())


def test_report_has_a_line_per_figure_and_format() -> None:
    values = {"mean": 0.5, "low_1_percent": 0.25, "worst": 0.125}
    figures = {"blocks": values, "student": values}
    case = {"name": "x", "what": "y", "tokens": 1, "index_dim": 2, "block_size": 3, "topk": 4, "queries": 5}
    result = {
        "command": "c",
        "machine": {"commit": "a", "cpu": "b", "kernel": "k", "python": "3"},
        "seconds": 60.0,
        "cases": [case | {"formats": {"bf16": figures, "fp8": figures}}],
    }
    lines = markdown(result).splitlines()
    assert "| x | selected blocks in common | fp8 | 0.5000 | 0.2500 | 0.1250 |" in lines
    assert sum(line.startswith("| x |") for line in lines) == 4


def test_bad_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--packs", "0"]) == 2
    assert "--packs=0: must be at least 1" in capsys.readouterr().err
