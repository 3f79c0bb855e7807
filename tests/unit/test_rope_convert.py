"""Scaling of the rotary embedding in config.json: read, written back in the same form, extended."""

import json
from typing import Any

import pytest

from msa_train.config import AttentionConfig, ModelConfig, RopeType, rope_of_model
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.config_write import extend_hf_config, write_hf_config
from tests.helpers.hf_files import small_m2, small_m3

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
