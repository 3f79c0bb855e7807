"""The msa-convert command from end to end, and msa-train finding what it left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launchers import convert, train
from launchers.hydra_config.compose import compose_run
from msa_train.checkpoint.compatibility import fingerprint
from msa_train.config import Activation, RunConfig
from msa_train.convert.tensor_map import M2_NAMING, M3_NAMING, M3_TEXT_NAMING
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.hf_files import read_tensors, small_m2, small_m3, write_checkpoint
from tests.helpers.training_command import train as train_command
from tests.helpers.training_command import write_corpus

SMALL = (
    "data.tokenizer=bytes",
    "data.seq_len=256",
    "launcher.num_processes=2",
    "parallel.cp_size=2",
    "parallel.ep_size=2",
    "train.steps=2",
    "train.validate_every=0",
    "optim.warmup_steps=0",
    "optim.lr=1e-30",
    "model.router_bias_update_rate=0",
    "logging.tensorboard=false",
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = convert.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A vision-language checkpoint with a tokenizer."""
    extra = {"vision_tower.patch.weight": torch.randn(3, 5)}
    write_checkpoint(tmp_path / "hf", small_m3(), M3_NAMING, extra=extra)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "image_processor.py").write_text("")
    (tmp_path / "hf" / "README.md").write_text("of the original")
    return tmp_path / "hf"


def test_there_and_back(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = tmp_path / "with space" / "ours", tmp_path / "back"
    code, out, err = run(capsys, "import", vision, ours)
    assert (code, err) == (
        2,
        "msa-convert: error: 1 tensors have no place in the model: vision_tower.patch.weight; "
        "--skip-unplaced leaves them out, --dry-run lists all\n",
    )
    assert out == "no place: vision_tower.patch.weight\n"
    assert not ours.exists()

    code, out, err = run(capsys, "import", vision, ours, "--skip-unplaced")
    assert (code, err) == (0, "")
    assert "no place: vision_tower.patch.weight\n" in out
    assert "(100%)" in out
    assert (
        f"train it:   msa-train --config-dir '{ours / 'conf'}' run=imported data.corpus=/your/text\n" in out
    )
    code, _, err = run(capsys, "import", vision, ours, "--skip-unplaced")
    assert code == 2
    assert "has checkpoints already" in err

    code, out, err = run(capsys, "export", ours, back, "--like", vision)
    assert (code, err) == (0, "")
    want, got = read_tensors(vision), read_tensors(back)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert {path.name for path in back.iterdir()} == {path.name for path in vision.iterdir()} - {"README.md"}
    code, _, err = run(capsys, "export", ours, back)
    assert code == 2
    assert "exists already" in err


def test_msa_train_finds_an_import(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = tmp_path / "ours"
    assert run(capsys, "import", vision, ours, "--skip-unplaced")[0] == 0
    config = compose_run(["run=imported", "optim.lr=1e-5"], [ours / "conf"])
    assert (config.checkpoint.load, config.data.tokenizer) == (
        str(ours),
        str(ours / "tokenizer/tokenizer.json"),
    )
    model, attention = small_m3()
    model.layer_attention = "full*1,msa*1,full*1,msa*1"
    assert fingerprint(config) == fingerprint(RunConfig(model=model, attention=attention))
    assert train.main(["--config-dir", str(ours / "conf"), "run=imported", "--cfg"]) == 0
    assert train.main([f"--config-dir={ours / 'conf'}", "run=imported", "model=imported", "--cfg"]) == 0
    assert capsys.readouterr().out.count("name: imported") == 4


def test_training_starts_from_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps that are too small to change a weight, export, import, and the same steps again."""
    model, attention = small_m3()
    # as many words as there are bytes, and a few for documents
    model.vocab_size = 320
    weights = write_checkpoint(tmp_path / "hf", (model, attention), M3_TEXT_NAMING, dtype=torch.bfloat16)
    assert run(capsys, "import", tmp_path / "hf", tmp_path / "ours")[0] == 0
    write_corpus(tmp_path / "corpus")
    corpus = [f"data.corpus={tmp_path / 'corpus'}", f"data.cache_dir={tmp_path / 'cache'}"]
    settings = ["--config-dir", str(tmp_path / "ours/conf"), "run=imported", *SMALL, *corpus]
    output = train_command(*settings, f"run_dir={tmp_path / 'run'}")
    assert "starting from the weights of" in output
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["lm_loss"] > 0
    assert run(capsys, "export", tmp_path / "run", tmp_path / "back")[0] == 0
    for name, tensor in read_tensors(tmp_path / "back").items():
        assert torch.equal(tensor, weights[name]), name
    assert run(capsys, "import", tmp_path / "back", tmp_path / "again")[0] == 0
    train_command(*settings, f"checkpoint.load={tmp_path / 'again'}", f"run_dir={tmp_path / 'other'}")
    assert [row["lm_loss"] for row in read_metrics(tmp_path / "other")] == [row["lm_loss"] for row in rows]


def test_config_dir_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["run=demo", "--config-dir"]) == 2
    assert train.main(["run=demo", "--config-dir", str(tmp_path)]) == 2
    assert train.main(["run=imported"]) == 2
    assert train.main(["run=demo", "--confg-dir", "x"]) == 2
    err = capsys.readouterr().err
    assert "--config-dir: a folder must follow" in err
    assert f"--config-dir={tmp_path}: holds none of the folders" in err
    assert "run=imported: there is no such run" in err
    assert "did you mean --config-dir?" in err


def test_dry_run_lists_and_writes_nothing(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "import", vision, tmp_path / "ours", "--dry-run")
    assert code == 0
    assert not (tmp_path / "ours").exists()
    lines = out.splitlines()
    name, key = "language_model.model.layers.1.block_sparse_moe.experts.2.w3.weight", "linear_fc1.weight"
    assert f"{name} [0:16] -> decoder.layers.1.mlp.experts.experts.{key} [80:96]" in lines
    assert "vision_tower.patch.weight -> no place" in lines
    assert run(capsys, "import", vision, tmp_path / "ours", "--skip-unplaced")[0] == 0
    code, out, _ = run(capsys, "export", tmp_path / "ours", tmp_path / "back", "--dry-run")
    assert code == 0
    assert not (tmp_path / "back").exists()
    assert "output_layer.weight [0:64] -> lm_head.weight [0:64]" in out.splitlines()


def errors(tmp_path: Path, hf: Path, ours: Path) -> dict[str, list[str | Path]]:
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = json.loads((hf / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    empty = tmp_path / "empty"
    empty.mkdir()
    return {
        "argument import|export: invalid choice": ["convert"],
        "required": ["import", hf],
        "config.json: cannot be read (No such file": ["import", empty, tmp_path / "x"],
        "--dequantize makes bf16 of them": ["import", quantized, tmp_path / "x"],
        f"{empty}: has no checkpoint": ["export", empty, tmp_path / "x"],
        "does not exist": ["export", tmp_path / "none", tmp_path / "x"],
        "--shard-size=5 bananas": ["export", ours, tmp_path / "x", "--shard-size", "5 bananas"],
        "config.json: cannot be read": ["export", ours, tmp_path / "x", "--like", empty],
    }


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING)
    assert run(capsys, "import", tmp_path / "hf", tmp_path / "ours")[0] == 0
    for line, arguments in errors(tmp_path, tmp_path / "hf", tmp_path / "ours").items():
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), line
        assert err.startswith("msa-convert: error: "), err
        assert line in err
        assert err.count("\n") == 1


def test_models_that_hugging_face_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING)
    assert run(capsys, "import", tmp_path / "hf", tmp_path / "ours")[0] == 0
    meta = tmp_path / "ours/checkpoints/step_00000000/meta.json"
    content = json.loads(meta.read_text())
    content["fingerprint"]["model.activation"] = Activation.swiglu_oai.value
    # damaged on purpose: the checksum of meta.json guards it
    meta.write_text(json.dumps(content))
    code, _, err = run(capsys, "export", tmp_path / "ours", tmp_path / "back")
    assert code == 2
    assert "is damaged (meta.json" in err


def test_damage_on_either_side_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that cannot be trained are not imported, one flipped bit of a checkpoint is not exported."""
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, shard_bytes=10**9)
    weights = tmp_path / "hf/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + b"\xff" * 8)
    code, _, err = run(capsys, "import", tmp_path / "hf", tmp_path / "new" / "ours")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds numbers that are not finite" in err
    assert not (tmp_path / "new").exists()

    weights.write_bytes(content)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    code, _, err = run(capsys, "import", tmp_path / "hf", tmp_path / "ours")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("msa-convert: warning: config.json says dtype=bfloat16, the weights are float32; ")

    file = next((tmp_path / "ours/checkpoints/step_00000000").glob("*.distcp"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    code, _, err = run(capsys, "export", tmp_path / "ours", tmp_path / "back")
    assert (code, err.count("\n")) == (2, 1)
    assert f"is damaged (model file {file.name}: checksum); name another one" in err
    assert not (tmp_path / "back").exists()
    assert run(capsys, "export", tmp_path / "ours", tmp_path / "back", "--no-checksums")[0] == 0


def test_help_needs_no_torch() -> None:
    text = (
        "import sys; from launchers import convert\ntry: convert.main(['--help'])\nexcept SystemExit: pass\n"
    )
    command = [sys.executable, "-c", text + "sys.exit('torch' in sys.modules)"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "import" in result.stdout
    assert "export" in result.stdout
