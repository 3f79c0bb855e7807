"""Random damage to everything that may come from somebody else: one line and exit code 2, or success.

No traceback, no hang, nothing that moves a terminal's cursor, no numbers from other places. Each case follows
from its number; MSA_TRAIN_FUZZ_FACTOR=50 runs 50 times as many, for an hour at a desk.
"""

import io
import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from launchers import convert, status
from launchers.hydra_config.compose import compose_run, config_to_yaml
from launchers.slurm import run_status
from msa_train.config import DataConfig
from msa_train.convert.tensor_map import M2_NAMING, M3_NAMING
from msa_train.data.tokenizers.tokenizer import build_tokenizer
from msa_train.parallel.selection_file import SelectionRecorder
from msa_train.simulate.inputs.cluster import PRESETS, load_cluster
from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.inputs.rates import load_rates, shipped_rates
from msa_train.simulate.selections.recorded import read_selections
from tests.helpers.hf_files import small_m2, small_m3, write_checkpoint
from tests.helpers.mutations import damaged, mutated_json

FACTOR = int(os.environ.get("MSA_TRAIN_FUZZ_FACTOR", "1"))
# far above what any case takes: a hang, not a slow machine
HANGS_AFTER_S = 120


@contextmanager
def _case(what: str) -> Iterator[Random]:
    """A random generator for one case; whatever goes wrong names the case."""

    def hangs(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield Random(what)
    except BaseException as error:
        error.add_note(f"in case {what}")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _cases(family: str, count: int) -> Iterator[str]:
    yield from (f"{family} {i}" for i in range(count * FACTOR))


def _is_line(text: str) -> bool:
    return text.isprintable() and bool(text)


def _refuses(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call returns, and whether it refused with one line instead."""
    try:
        return call(), False
    except ValueError as error:
        message = str(error)
    assert _is_line(message), repr(message)
    return None, True


def _run(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: str
) -> tuple[int, str]:
    """Exit code and output of a command, which must be text for a terminal."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code in (0, 2), (code, err)
    lines = err.splitlines()
    assert all(map(_is_line, lines)), repr(err)
    assert all(map(_is_line, out.splitlines())), repr(out)
    if code:
        assert len(lines) == 1, err
    return code, out


def _write_safely(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_hugging_face_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {}
    for name, shape, naming in (("m2", small_m2(), M2_NAMING), ("m3", small_m3(), M3_NAMING)):
        write_checkpoint(tmp_path / name, shape, naming, shard_bytes=10**9 if name == "m2" else 60_000)
        code, listing = _run(
            capsys, convert.main, "import", str(tmp_path / name), str(tmp_path / "x"), "--dry-run"
        )
        assert code == 0
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        sources[name] = files, listing
    refused = 0
    for what in _cases("folder", 80):
        with _case(what) as rng:
            name = rng.choice(list(sources))
            files, listing = sources[name]
            victim = rng.choice(sorted(files))
            content = files[victim]
            if victim.endswith(".safetensors"):
                (length,) = struct.unpack("<Q", content[:8])
                header = content[8 : 8 + length]
                if rng.random() < 0.5:
                    header = mutated_json(rng, json.loads(header))
                    changed = struct.pack("<Q", len(header)) + header + content[8 + length :]
                else:
                    changed = damaged(rng, content[: 8 + length]) + content[8 + length :]
            elif rng.random() < 0.7:
                changed = mutated_json(rng, json.loads(content))
            else:
                changed = damaged(rng, content)
            _write_safely(tmp_path / name / victim, changed)
            arguments = ("import", str(tmp_path / name), str(tmp_path / "x"), "--dry-run")
            code, out = _run(capsys, convert.main, *arguments)
            refused += code != 0
            if code == 0 and victim != "config.json":
                assert out == listing, "rows from other places"
            assert not (tmp_path / "x").exists()
            _write_safely(tmp_path / name / victim, content)
    assert refused


def _tokenizers() -> dict[str, Any]:
    """Small ones of every kind, as JSON."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    kinds: dict[str, Any] = {
        "bytes": models.BPE(vocab=alphabet, merges=[]),
        "bpe": models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "?": 3}, merges=[("a", "b")], unk_token="?"),
        "unigram": models.Unigram([("a", -1.0), ("b", -2.0), ("?", -9.0)], unk_id=2),
        "words": models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"),
        "pieces": models.WordPiece({"a": 0, "##b": 1, "?": 2}, unk_token="?"),
    }
    result = {}
    for name, model in kinds.items():
        tokenizer: Any = Tokenizer(model)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.ByteLevel(add_prefix_space=False)
            if name == "bytes"
            else pre_tokenizers.Whitespace()
        )
        tokenizer.add_special_tokens(["</s>", "<pad>"])
        result[name] = json.loads(tokenizer.to_str())
    return result


def test_tokenizers(tmp_path: Path) -> None:
    made, path, read = _tokenizers(), tmp_path / "tokenizer.json", 0
    text = "ab b a </s> <pad> \u4f60 zz".encode()
    for what in _cases("tokenizer", 300):
        with _case(what) as rng:
            good = made[rng.choice(list(made))]
            # words are many and all alike: the rest is changed more often
            value = good | {"model": good["model"] | {"vocab": good["model"]["vocab"]}}
            if rng.random() < 0.5:
                rest = {name: one for name, one in value["model"].items() if name != "vocab"}
                changed = json.loads(json.dumps(value))
                try:
                    changed["model"] = json.loads(mutated_json(rng, rest)) | {
                        "vocab": value["model"]["vocab"]
                    }
                except (ValueError, TypeError, RecursionError):
                    continue
                content = json.dumps(changed).encode()
            else:
                content = mutated_json(rng, value)
            path.write_bytes(content)
            tokenizer, refused = _refuses(lambda: build_tokenizer(DataConfig(tokenizer=str(path))))
            if refused:
                continue
            ids, refused = _refuses(lambda tokenizer=tokenizer: tokenizer.encode(text))
            if not refused:
                read += 1
                assert (ids != tokenizer.eod_id).all(), "no text ends a document"
                assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
                _refuses(tokenizer.findings)
    assert read


METRICS = {"step": 2, "lm_loss": 2.5, "tokens_per_s": 900.0, "step_time_s": 0.5, "stage": 0}


def test_files_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """msa-status on a folder that was copied from somewhere."""
    monkeypatch.setattr(run_status, "ask_slurm", lambda *_command: None)
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    stopped = {"step": 2, "signal": "SIGTERM", "saved": True, "generation": "7.0", "time": "now"}
    objects: dict[str, Any] = {"slurm/job.json": {"job_id": "7", "time": "now"}, "stopped.json": stopped}
    texts = {
        "config.yaml": config_to_yaml(compose_run(["run=smoke"])),
        "metrics.jsonl": json.dumps({**METRICS, "step": 1}) + "\n" + json.dumps(METRICS) + "\n",
        "slurm/starts.tsv": "now\t7\t0\t0\tnode1\nlater\t7\t1\t2\tnode2\n",
    }
    files = {name: json.dumps(one).encode() for name, one in objects.items()}
    files |= {name: text.encode() for name, text in texts.items()}
    for name, content in files.items():
        (run / name).write_bytes(content)
    assert _run(capsys, status.main, str(run))[0] == 0
    # a loss that is not finite stands as null there, and JSON has no word for it either
    (run / "metrics.jsonl").write_text(json.dumps({**METRICS, "lm_loss": None}) + "\n")
    assert status.main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lm_loss"] is None
    config = yaml.safe_load(texts["config.yaml"])
    for what in _cases("run", 25):
        with _case(what) as rng:
            name = rng.choice(sorted(files))
            if name in objects:
                content = mutated_json(rng, objects[name])
            elif name == "metrics.jsonl" and rng.random() < 0.7:
                content = mutated_json(rng, METRICS) + b"\n"
            elif name == "config.yaml" and rng.random() < 0.7:
                # JSON is YAML
                content = mutated_json(rng, config)
            else:
                content = damaged(rng, files[name])
            (run / name).write_bytes(content)
            _run(capsys, status.main, str(run), *(["--json"] if rng.random() < 0.3 else []))
            (run / name).write_bytes(files[name])


def test_yaml_that_grows_by_its_aliases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]"
        for before, one in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    bomb = "a: &a [x, x, x]\n" + "\n".join(lines)
    for text in (bomb, "a: &a [*a]", "a: " + "[" * 2000, "? [a]\n: 1", "!!python/object/apply:os.system [x]"):
        (tmp_path / "config.yaml").write_text(text)
        (tmp_path / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
        assert _run(capsys, status.main, str(tmp_path))[0] == 2
        (tmp_path / "cluster.yaml").write_text(text)
        assert _refuses(lambda: load_cluster(str(tmp_path / "cluster.yaml")))[1]


def test_recordings_clusters_and_rates(tmp_path: Path) -> None:
    recorder = SelectionRecorder(
        seq_len=256, block_size=16, num_kv_heads=2, topk=4, first_token=0, num_tokens=256, chunk_tokens=64,
        cu_seqlens=[0, 256], num_samples=8,
    )  # fmt: skip
    recorder.add(1, np.random.default_rng(1).integers(-1, 16, (256, 2, 4)))
    path = tmp_path / "part.npz"
    recorder.save(path, "a run")
    good = path.read_bytes()
    arrays = dict(np.load(path))
    placement = place("contiguous", seq_len=256, block_size=16, cp_size=4)
    want = [read_selections(path)[0].needed(placement, rank) for rank in range(4)]
    odd = (0, -5, 3, 10**12, 2.0, float("nan"), "x", "\x1b[2J", np.zeros(3), np.zeros((0,), int), np.uint8(3))
    cluster = {name: getattr(PRESETS["h100"], name) for name in PRESETS["h100"].__dataclass_fields__}
    rates = yaml.safe_load(shipped_rates()["xeon_cpu"].read_text())
    for what in _cases("recording", 250):
        with _case(what) as rng:
            kind = rng.randrange(4)
            if kind > 1:
                value, load = ((cluster, load_cluster), (rates, load_rates))[kind - 2]
                other = tmp_path / f"file.{rng.choice(('json', 'yaml'))}"
                other.write_bytes(mutated_json(rng, value))
                _refuses(lambda load=load, other=other: load(str(other)))
                continue
            if kind:
                path.write_bytes(damaged(rng, good))
            else:
                name = rng.choice(sorted(arrays))
                changed = arrays | {
                    name: rng.choice(
                        (
                            *odd,
                            arrays[name][..., :1] if arrays[name].ndim else 1,
                            arrays[name] + 1 if arrays[name].dtype.kind in "iu" else "y",
                        )
                    )
                }
                content = io.BytesIO()
                np.savez_compressed(content, **changed)
                path.write_bytes(content.getvalue())
            layers, refused = _refuses(lambda: read_selections(path))
            if refused:
                continue
            layer = layers[0]
            assert _is_line(layer.describe())
            if (layer.seq_len, layer.block_size) == (256, 16):
                for rank in range(4):
                    found, refused = _refuses(lambda layer=layer, rank=rank: layer.needed(placement, rank))
                    if kind and not refused:
                        assert (found == want[rank]).all(), "damage is found by the archive's checksums"
                layer.local_share(placement)
