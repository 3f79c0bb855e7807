"""Parts of a step, told from stacks."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.million.parts import REST, part_of, shares
from benchmarks.million.peak_memory import PeakMemory
from benchmarks.million.run import _document

STEP = 'process 7:"python";_work (worker.py:111);TorchEngine.train_step (engines/torch_engine.py:90)'


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        ("score (msa_kernels/select_blocks/reference.py:3)", "scoring and selection"),
        (
            "attend (msa_kernels/block_sparse_attention/tiled.py:9);einsum (torch/functional.py:1)",
            "sparse attention",
        ),
        # a collective that a kernel's caller waits for
        ("f (parallel/attention/cp_sparse.py:1);wait (msa_train/parallel/comm/cp_comm.py:5)", "exchange"),
        ("f (torch/nn/modules/module.py:1)", REST),
    ],
)
def test_innermost_known_frame_decides(frames: str, part: str) -> None:
    assert part_of(f"{STEP};{frames}") == part


def test_shares_are_of_the_looks_within_a_step() -> None:
    lines = [
        f"{STEP};a (msa_kernels/select_blocks/op.py:3) 6",
        f"{STEP};b (x.py:3) 2",
        "c (msa_kernels/select_blocks/op.py:3) 50",
    ]
    assert shares(lines) == {"scoring and selection": 0.75, REST: 0.25}
    with pytest.raises(ValueError, match="no step"):
        shares(lines[2:])


def test_document_is_ascii_of_the_wanted_length() -> None:
    text = _document(100_000)
    assert len(text) == 100_000
    assert text.isascii()
    assert _document(10) == text[:10]


def test_the_most_memory_of_a_worker_is_seen_after_it_is_given_back(tmp_path: Path) -> None:
    code = "import time; a = bytearray(200 << 20); del a; time.sleep(2.5)"
    with PeakMemory(str(tmp_path)) as peak:
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.yaml")], check=True)
        subprocess.run([sys.executable, "-c", "pass", str(tmp_path)], check=True)
    (gib,) = peak.gib()
    assert 0.2 < gib < 0.5
