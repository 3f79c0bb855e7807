"""Scaling of the rotary embedding in config.json: read, written back in the same form, extended."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers import convert
from msa_train.checkpoint.manifest import file_entry
from msa_train.checkpoint.weights_only import checkpoint_folder, shape_of, trained_seq_len
from msa_train.config import AttentionConfig, ModelConfig, RopeType, rope_of_model
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.config_write import DEFAULT_MAX_POSITIONS, extend_hf_config, write_hf_config
from msa_train.convert.tensor_map import M3_NAMING, M3_TEXT_NAMING
from msa_train.runtime.atomic_files import write_json
from tests.helpers.hf_files import read_tensors, small_m2, small_m3, write_checkpoint

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": RopeType.linear, "rope_factor": 4.0},
    "yarn": {"rope_type": RopeType.yarn, "rope_factor": 4.0, "rope_original_length": 4096},
    "yarn_given": {
        "rope_type": RopeType.yarn,
        "rope_factor": 4.0,
        "rope_original_length": 4096,
        "rope_beta_fast": 20.0,
        "rope_beta_slow": 2.0,
        "rope_mscale": 0.5,
        "rope_mscale_all_dim": 0.7,
        "rope_attention_factor": 1.5,
        "rope_truncate": False,
    },
}
# as released: theta, and the rotated share, beside
RELEASED: dict[str, Any] = {"model_type": "minimax_m2", "rope_theta": 5000000, "rotary_dim": 64}
YARN = {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 196608}


def with_scaling(shape: tuple[ModelConfig, AttentionConfig], name: str) -> ModelConfig:
    for key, value in SCALINGS[name].items():
        setattr(shape[0], key, value)
    return shape[0]


def roped(model: ModelConfig) -> dict[str, Any]:
    fields = [*ModelConfig.__dataclass_fields__]
    return {name: getattr(model, name) for name in fields if name.startswith(("rope_", "rotary_"))}


@pytest.mark.parametrize("make", [small_m2, small_m3])
@pytest.mark.parametrize("name", SCALINGS)
def test_written_config_is_read_back(name: str, make: Any) -> None:
    shape = make()
    model = with_scaling(shape, name)
    config = json.loads(json.dumps(write_hf_config(*shape, dtype="float32")))
    hf = read_hf_config(config)
    assert roped(hf.model) == roped(model)
    again = write_hf_config(hf.model, hf.attention, dtype="float32")
    assert again["rope_parameters"] == config["rope_parameters"]
    assert extend_hf_config(config, hf.model, hf.attention) == config


def test_ntk_is_written_as_the_theta_that_it_is() -> None:
    model, attention = small_m3()
    model.rope_type, model.rope_factor = RopeType.ntk, 4.0
    read = read_hf_config(write_hf_config(model, attention, dtype="float32")).model
    assert (read.rope_type, read.rope_theta) == (RopeType.default, 1e4 * 4.0**2)
    assert rope_of_model(read).base(4) == rope_of_model(model).base(4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}},
        {"rope_parameters": YARN | {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
        {"rope_scaling": YARN | {"attention_factor": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 5}, "max_position_embeddings": 196608},
        {
            "rope_scaling": YARN | {"factor": None},
            "max_position_embeddings": 5 * 196608,
        },
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 5},
            "original_max_position_embeddings": 196608,
        },
    ],
)
def test_every_form_of_yarn_means_the_same(rope: dict[str, Any]) -> None:
    model = read_hf_config(RELEASED | rope).model
    assert (model.rope_type, model.rope_factor) == (RopeType.yarn, 5.0)
    assert (model.rope_theta, model.rope_original_length, model.rotary_dim) == (5e6, 196608, 64)
    # and it is left as it is where nothing changed
    hf = read_hf_config(RELEASED | rope)
    assert read_hf_config(extend_hf_config(RELEASED | rope, hf.model, hf.attention)) == hf


def test_forms_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    for make in (small_m2, small_m3):
        shape = make()
        with_scaling(shape, "yarn")
        written = write_hf_config(*shape, dtype="float32")
        kind = transformers.MiniMaxM2Config if make is small_m2 else transformers.MiniMaxM3VLTextConfig
        assert kind(**written).rope_parameters == written["rope_parameters"]
        assert read_hf_config(kind(**written).to_dict()).model.rope_original_length == 4096


@pytest.mark.parametrize("place", ["none", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
def test_an_extension_changes_what_is_there(place: str, name: str) -> None:
    config = dict(RELEASED)
    if place != "none":
        config[place] = YARN if place == "rope_scaling" else YARN | {"rope_theta": 5000000}
    hf = read_hf_config(config)
    for key, value in roped(ModelConfig(**SCALINGS[name])).items():
        if key not in ("rope_theta", "rotary_dim"):
            setattr(hf.model, key, value)
    extended = extend_hf_config(config, hf.model, hf.attention, max_positions=1048576)
    assert read_hf_config(extended) == hf
    assert extended["max_position_embeddings"] == 1048576
    assert extended["rope_theta"] == 5000000
    assert ("rope_scaling" in extended) is (place != "rope_parameters" and name != "default")


@pytest.mark.parametrize("is_like", [False, True])
def test_an_export_has_the_embedding_of_the_last_stage(tmp_path: Path, is_like: bool) -> None:
    """Import, stages (their record, at least), export, import again: same weights, same config."""
    naming = M3_NAMING if is_like else M3_TEXT_NAMING
    want = write_checkpoint(tmp_path / "hf", small_m3(), naming)
    hf_config = json.loads((tmp_path / "hf/config.json").read_text())
    hf_config.get("text_config", hf_config)["max_position_embeddings"] = 4096
    (tmp_path / "hf/config.json").write_text(json.dumps(hf_config))
    assert convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    folder = checkpoint_folder(tmp_path / "ours")
    assert trained_seq_len(folder) == 0
    meta = json.loads((folder / "meta.json").read_text())
    model = small_m3()[0]
    first = rope_of_model(model).record()
    for name, value in SCALINGS["yarn"].items():
        setattr(model, name, value)
    last = rope_of_model(model).record() | {"theta": 2e6}
    stage = {"name": "a", "first_step": 0, "num_steps": 1}
    meta["stages"] = [stage | {"seq_len": 4096, "rope": first}, stage | {"seq_len": 16384, "rope": last}]
    (folder / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["meta.json"] = file_entry(folder / "meta.json")
    write_json(folder / "manifest.json", manifest)
    assert roped(shape_of(folder)[0]) == roped(model) | {"rope_theta": 2e6}

    like = ["--like", str(tmp_path / "hf")] if is_like else []
    assert convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), *like]) == 0
    text = json.loads((tmp_path / "back/config.json").read_text())
    text = text.get("text_config", text)
    assert text["max_position_embeddings"] == (16384 if is_like else DEFAULT_MAX_POSITIONS)
    assert text["rope_parameters"]["rope_theta"] == 2e6
    assert text["rope_parameters"]["original_max_position_embeddings"] == 4096
    got = read_tensors(tmp_path / "back")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert convert.main(["import", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    again = shape_of(checkpoint_folder(tmp_path / "again"))
    assert again == shape_of(folder)
