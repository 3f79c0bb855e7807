"""The msa-checkpoint command on checkpoints of a small run by both engines."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from launchers import checkpoint
from msa_train.checkpoint import diff as checkpoint_diff
from msa_train.checkpoint.diff import diff_checkpoints
from msa_train.checkpoint.manifest import MANIFEST_NAME, file_entry
from msa_train.checkpoint.meta import META_NAME
from msa_train.checkpoint.torch_dist.files import ShardedReader, ShardedWriter
from msa_train.runtime.atomic_files import write_json

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format1"
SHARD = "__0_0.distcp"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs torch and megatron, each with a checkpoint of step 2."""
    for engine in ("torch", "megatron"):
        with tarfile.open(FIXTURES / f"{engine}.tar.xz") as tar:
            tar.extractall(tmp_path / engine / "checkpoints", filter="data")
    return tmp_path


def copy_as(run_dir: Path, step: int) -> Path:
    """The checkpoint of step 2 as one of another step."""
    target = run_dir / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(run_dir / "checkpoints" / "step_00000002", target)
    change_meta(target, step=step)
    return target


def change_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / META_NAME).read_text())
    write_json(folder / META_NAME, meta | changes)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"][META_NAME] = file_entry(folder / META_NAME)
    write_json(folder / MANIFEST_NAME, manifest)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = checkpoint.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"world_size": 8, "cp_size": 2, "ep_size": 4, "tp_size": 1, "pp_size": 1, "dp_size": 4}
    newer = copy_as(runs / "torch", 10)
    stages = [{"name": "at_512k", "first_step": 0, "num_steps": 10}]
    change_meta(newer, engine="torch", layout=layout, stages=stages, ends_stage=True)
    (copy_as(runs / "torch", 12) / SHARD).unlink()
    code, out, err = run(capsys, "ls", runs / "torch")
    assert (code, err) == (0, "")
    head, second, tenth, twelfth = out.splitlines()
    assert head.split() == ["step", "time", "size", "stage", "layout", "engine", "sound"]
    assert second.split()[0] == "2"
    assert second.endswith("1 process  -       yes") or second.split()[-2:] == ["-", "yes"]
    assert "at_512k (end)  cp2 ep4 dp4" in tenth
    assert tenth.split()[-2:] == ["torch", "yes"]
    assert f"model file {SHARD}: missing" in twelfth
    code, out, _ = run(capsys, "ls", newer, "--json")
    (row,) = json.loads(out)
    assert (row["step"], row["layout"], row["sound"]) == (10, layout, True)
    assert (row["stage"], row["ends_stage"]) == ("at_512k", True)
    assert row["size"] > sum(path.stat().st_size for path in newer.glob("*.distcp"))


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "x"},
        {"layout": {"cp_size": "2"}},
        {"layout": None},
        {"bad_steps": []},
        {"ends_stage": 1},
        {"ends_stage": "yes"},
        {"bad_steps": {"rollbacks": 5}},
        {"bad_steps": {"in_a_row": "\x1b[2J"}},
    ],
)
def test_meta_of_other_kinds_is_damage(
    change: dict[str, object], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_as(runs / "torch", 10)
    change_meta(folder, engine="\x1b[2Jtorch", **change)
    code, out, err = run(capsys, "ls", runs / "torch")
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())
    assert out.splitlines()[2].endswith(f"{META_NAME}: {next(iter(change))} is damaged")
    assert run(capsys, "verify", folder)[0] == 1
    assert run(capsys, "prune", runs / "torch", "--keep-last", 1, "--dry-run")[0] == 0


def test_verify(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = copy_as(runs / "torch", 4)
    assert run(capsys, "verify", runs / "torch", runs / "megatron")[0] == 0
    flip(newer / SHARD)
    assert run(capsys, "verify", "--quick", runs / "torch")[0] == 0
    code, out, err = run(capsys, "verify", runs / "torch", runs / "megatron")
    assert (code, err) == (1, "")
    assert [line.rpartition(": ")[2] for line in out.splitlines()] == ["sound", "checksum", "sound"]
    assert run(capsys, "verify", newer.parent / "step_00000002")[0] == 0


def test_prune(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (4, 6, 8):
        copy_as(runs / "torch", step)
    arguments = ("prune", runs / "torch", "--keep-last", 1, "--keep-every", 4)
    _, out, _ = run(capsys, *arguments, "--dry-run")
    assert [line.partition(": ")[2] for line in out.splitlines()[:-1]] == ["would be removed"] * 2
    assert len(list((runs / "torch" / "checkpoints").glob("step_*"))) == 4
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.splitlines()[-1] == "kept: 4, 8"
    names = sorted(path.name for path in (runs / "torch" / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000008"]


def test_diff_of_engines_is_rounding(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "diff", runs / "torch", runs / "megatron")
    assert (code, err) == (1, "")
    assert "only in" not in out
    assert "differ, by up to" in out
    code, out, _ = run(capsys, "diff", runs / "torch", runs / "megatron", "--tolerance", 1e-5)
    assert code == 0
    assert " 0 differ; largest difference " in out
    assert run(capsys, "diff", runs / "torch", runs / "torch")[:2][0] == 0


def test_diff_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tensors were cut in other ways, and read in pieces of a few rows."""
    monkeypatch.setattr(checkpoint_diff, "PIECE_BYTES", 2 * 8 * 4)
    big = torch.arange(2 * 5 * 4.0).view(2, 5, 4)
    other = big.clone()
    other[1, 3, 2] += 0.5
    first = {"experts": big, "line": torch.ones(7), "narrow": torch.ones(3), "gone": torch.ones(1)}
    second = {"experts": other, "line": torch.ones(7), "narrow": torch.ones(4), "new": torch.ones(1)}
    second["line"][6] = float("nan")
    folders = []
    for number, tensors in enumerate((first, second)):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        writer = ShardedWriter(folders[-1])
        for key, tensor in tensors.items():
            cuts = tensor.split(1 + number) if key == "experts" else [tensor]
            for at, piece in enumerate(cuts):
                offset = at * (1 + number) if key == "experts" else 0
                writer.add(key, tensor.shape, (offset, *[0] * (tensor.dim() - 1)), piece)
        writer.close()
        meta = {"format_version": 1 + number, "step": 4, "fingerprint": {"model.num_layers": 2 + number}}
        write_json(folders[-1] / META_NAME, meta)
    assert ShardedReader(folders[0]).shapes()["experts"] == (2, 5, 4)
    found = diff_checkpoints(*folders)
    assert found.settings == {"format_version": (1, 2), "model.num_layers": (2, 3)}
    assert (found.missing, found.extra, found.num_equal) == (["gone"], ["new"], 0)
    by_key = {one.key: one for one in found.different}
    experts, line, narrow = by_key["experts"], by_key["line"], by_key["narrow"]
    assert (experts.num_different, experts.num_elements, experts.max_abs) == (1, 40, 0.5)
    assert (line.num_different, line.max_abs) == (1, float("inf"))
    assert narrow.notes == ["shape 3, 4"]


def test_diff_compares_the_record_of_the_data() -> None:
    """But for where it lay, and what was before."""
    data = {"corpus": "/a", "tokenizer": "bytes", "content": "c", "seed": 1, "before": []}
    first = {"data": data}
    assert checkpoint_diff._diff_meta(first, {"data": {**data, "corpus": "/b", "before": [{}]}}) == {}
    assert checkpoint_diff._diff_meta(first, {"data": {**data, "seed": 2}}) == {"data.seed": (1, 2)}
    assert checkpoint_diff._diff_meta(first, {}) == {"data.content": ("c", None), "data.seed": (1, None)}


def test_pieces_cover_a_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_diff, "PIECE_BYTES", 2 * 8 * 4)
    assert list(checkpoint_diff.pieces((2, 3, 4))) == [(0, 2), (2, 1), (3, 2), (5, 1)]
    assert list(checkpoint_diff.pieces((5,))) == [(0, 5)]
    assert list(checkpoint_diff.pieces((3, 100))) == [(0, 1), (1, 1), (2, 1)]


def test_mistakes_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (("ls", tmp_path / "gone"), "gone: does not exist; name the run_dir"),
        (("prune", runs / "torch", "--keep-last", 0), "--keep-last=0: must be at least 1"),
        (
            ("prune", runs / "torch", "--keep-last", 1, "--keep-every", -1),
            "--keep-every=-1: must be 0 (none)",
        ),
        (("diff", runs / "torch"), "the following arguments are required: B; see msa-checkpoint --help"),
    ]
    (runs / "megatron" / "checkpoints" / "step_00000002" / SHARD).unlink()
    cases.append((("diff", runs / "torch", runs / "megatron"), f"is damaged (model file {SHARD}: missing)"))
    for arguments, text in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("msa-checkpoint: error: ")
        assert text in err
