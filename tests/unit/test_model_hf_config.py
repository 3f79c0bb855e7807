"""config.json and our configuration."""

import json
from typing import Any

import pytest

from launchers.hydra_config.compose import compose_run
from msa_train.config import ModelConfig
from msa_train.convert.config_fields import Family
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.config_write import extend_hf_config, family_of, write_hf_config
from tests.helpers.hf_files import small_m2, small_m3

LAYERS = 60
# The fields of the released checkpoints
M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
    "torch_dtype": "bfloat16",
}
M3_TEXT: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 3072,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 200064,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-06,
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "hidden_act": "swigluoai",
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "dense_intermediate_size": 12288,
    "shared_intermediate_size": 3072,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "moe_layer_freq": [0] * 3 + [1] * 57,
    "qk_norm_type": "per_head",
    "num_mtp_modules": 7,
    "num_nextn_predict_layers": 1,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "routed_scaling_factor": 2.0,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 4,
        "sparse_topk_blocks": 16,
        "sparse_block_size": 128,
        "sparse_disable_index_value": [0] * 3 + [1] * 57,
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0] * 3 + [1] * 57,
    },
    "architectures": ["MiniMaxM3SparseForCausalLM"],
}


def m3(**changes: Any) -> dict[str, Any]:
    text = json.loads(json.dumps(M3_TEXT))
    for name, value in changes.items():
        if value is ...:
            del text[name]
        elif name in text["sparse_attention_config"]:
            text["sparse_attention_config"][name] = value
        else:
            text[name] = value
    return {"model_type": "minimax_m3_vl", "text_config": text, "vision_config": {"hidden_size": 1280}}


@pytest.mark.parametrize(("config", "run"), [(M2, "m2_32k"), (m3(), "m3_200k")])
def test_released_models_are_our_presets(config: dict[str, Any], run: str) -> None:
    hf, preset = read_hf_config(config), compose_run([f"run={run}"])
    hf.model.name = preset.model.name
    assert hf.model.attention_kinds() == preset.model.attention_kinds()
    hf.model.layer_attention = preset.model.layer_attention
    assert hf.model == preset.model
    assert hf.attention == preset.attention


def test_absent_fields_are_those_of_the_released_models() -> None:
    assert read_hf_config({"model_type": "minimax_m2", "rotary_dim": 64}).model == read_hf_config(M2).model
    kept = {"rotary_dim", "partial_rotary_factor", "moe_layer_freq", "sparse_attention_config"}
    few = m3()
    few["text_config"] = {name: few["text_config"][name] for name in kept}
    for name in ("index_dim", "num_index_heads", "topk_blocks", "block_size", "local_block"):
        del few["text_config"]["sparse_attention_config"][f"sparse_{name}"]
    assert read_hf_config(few) == read_hf_config(m3())


@pytest.mark.parametrize("shape", [small_m2(), small_m3()])
def test_written_config_means_the_same(shape: tuple[Any, Any]) -> None:
    model, attention = shape
    # a factor that a division does not give exactly
    model.head_dim, model.rotary_dim, attention.index_head_dim = 100, 58, 60
    config = json.loads(json.dumps(write_hf_config(model, attention, dtype="bfloat16")))
    assert int(100 * config["rope_parameters"]["partial_rotary_factor"]) == 58
    hf = read_hf_config(config)
    assert hf.family is family_of(model)
    hf.model.layer_attention = model.layer_attention
    model.init_std = model.embedding_init_std = hf.model.init_std
    model.embedding_shared_std = 0.0
    assert hf.model == model
    if hf.family is Family.m3:
        assert hf.attention == attention


REFUSED = {
    "hidden_act=gelu: ": m3(hidden_act="gelu"),
    "swiglu_limit=10.0: is not implemented here; must be 7.0": m3(swiglu_limit=10.0),
    "swiglu_alpha=1.0: ": m3(swiglu_alpha=1.0),
    "use_gemma_norm=False: ": m3(use_gemma_norm=False),
    "attention_output_gate=True: ": m3(attention_output_gate=True),
    "scoring_func=softmax: ": m3(scoring_func="softmax"),
    "use_routing_bias=False: ": m3(use_routing_bias=False),
    "n_shared_experts=2: ": m3(n_shared_experts=2),
    "router_jitter_noise=0.1: ": m3(router_jitter_noise=0.1),
    "qk_norm_type=per_layer: ": m3(qk_norm_type="per_layer"),
    "num_experts_per_tok=1: ": m3(num_experts_per_tok=1),
    "mlp_layer_types=[": m3(moe_layer_freq=[0, 1, 0] + [1] * 57),
    "layer_types=sliding_attention: ": m3(layer_types=["sliding_attention"] * 60),
    "layer_types=['full": m3(layer_types=["full_attention"] * 59),
    "index_n_heads=8: must be num_key_value_heads=4": m3(sparse_num_index_heads=8),
    "index_head_dim=32: must be at least the rotated channels, 64": m3(sparse_index_dim=32),
    "index_local_blocks=0: ": m3(sparse_local_block=0),
    "index_topk_blocks=8: sparse_attention_config says 16": m3(index_topk_blocks=8),
    "sparse_attention_config.sparse_init_block=1: ": m3(sparse_init_block=1),
    "sparse_attention_config.sparse_score_type=mean: ": m3(sparse_score_type="mean"),
    "sparse_attention_config.sparse_disable_index_value=": m3(sparse_disable_index_value=[0] * 60),
    "rotary_dim=32: transformers rotates 64 of 128": m3(rotary_dim=32),
    "rotary_dim=64: transformers rotates 128 of 128": m3(partial_rotary_factor=...),
    "rope_scaling.rope_type=dynamic: is not supported, as its": m3(
        rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "rope_scaling.type=longrope: is not implemented here": m3(rope_scaling={"type": "longrope"}),
    "rope_scaling.type=linear: rope_type says yarn": m3(rope_scaling={"rope_type": "yarn", "type": "linear"}),
    "rope_scaling.factor=None: must be a number": m3(rope_scaling={"type": "linear"}),
    "rope_scaling.factor=0.5: must be at least 1": m3(rope_scaling={"type": "linear", "factor": 0.5}),
    "rope_scaling.beta_fast=32: has no effect with linear": m3(
        rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32}
    ),
    "rope_scaling.truncate=1: must be true or false": m3(
        rope_scaling={"type": "yarn", "factor": 2.0, "truncate": 1}
    ),
    "rope_scaling.original_max_position_embeddings=None: must be a whole number": m3(
        rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=...
    ),
    "original_max_position_embeddings=8: rope_scaling say 4": m3(
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
        original_max_position_embeddings=8,
    ),
    "rope_scaling={'rope_type': 'linear', 'factor': 2.0}: transformers takes this in place of": m3(
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "rope_scaling={'rope_type': 'default', 'partial_rotary_factor': 1.0}: transformers takes this": m3(
        rope_parameters={"rope_theta": 5e6}, rope_scaling={"partial_rotary_factor": 1.0}
    ),
    "rope_parameters.factor=2.0: ": m3(rope_parameters={"rope_type": "default", "factor": 2.0}),
    "rope_scaling=linear: must be an object": m3(rope_scaling="linear"),
    "rope_theta=5e+06: rope_parameters say 1;": m3(rope_parameters={"rope_theta": 1.0}),
    "rope_theta=5e6: must be a number above 0": m3(rope_theta="5e6"),
    "rope_theta=0: must be a number above 0": m3(rope_theta=0),
    "partial_rotary_factor=0.5: must be a number": m3(partial_rotary_factor="0.5"),
    "hidden_size=6144: must be a whole number from 1 on": m3(hidden_size="6144"),
    "hidden_size=6144.0: ": m3(hidden_size=6144.0),
    "hidden_size=None: ": m3(hidden_size=None),
    "hidden_size=True: ": m3(hidden_size=True),
    "hidden_size=[6144]: ": m3(hidden_size=[6144]),
    "hidden_size=-1: ": m3(hidden_size=-1),
    "hidden_size=1000000000000: ": m3(hidden_size=10**12),
    "num_hidden_layers=100000: must be at most 4,096": m3(num_hidden_layers=100_000),
    "num_local_experts=100000: must be at most 1,048,576 over all 60 layers": m3(num_local_experts=100_000),
    "num_attention_heads=100000: must be at most 1,048,576 over all": m3(num_attention_heads=100_000),
    "num_experts=64: num_local_experts says 128": m3(num_experts=64),
    "rms_norm_eps=inf: must be a number above 0": m3(rms_norm_eps=float("inf")),
    "rms_norm_eps=1e-06: ": m3(rms_norm_eps="1e-06"),
    "rms_norm_eps=None: ": m3(rms_norm_eps=None),
    "tie_word_embeddings=false: must be true or false": m3(tie_word_embeddings="false"),
    "moe_layer_freq=1: must be a list": m3(moe_layer_freq=1),
    "layer_types=[['full_attention']]: must be a list of an entry per layer": m3(
        layer_types=[["full_attention"]]
    ),
    "sparse_attention_config.sparse_attention_freq=1: must be a list": m3(sparse_attention_freq=1),
    "index_topk_blocks=16: must be a whole number": m3(sparse_topk_blocks="16"),
    "index_topk_blocks=None: ": m3(sparse_topk_blocks=None),
    "quantization_config.weight_block_size=0: ": M2
    | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
    "attn_type_list=5: must be a list": M2 | {"attn_type_list": 5},
    r"evil \x1b]0;x\x07=5: this field is not known here": M2 | {"evil \x1b]0;x\x07": 5},
    "new_field=3: this field is not known here": m3(new_field=3),
    "quantization_config.quant_method=mxfp8: ": M2
    | {"quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}},
    "quantization_config.quant_method=fp8: ": M2 | {"quantization_config": {"quant_method": "fp8"}},
    "attn_type_list=[0": M2 | {"attn_type_list": [0] * 62},
    "shared_intermediate_size=64: ": M2 | {"shared_intermediate_size": 64},
    "model_type=llama: ": {"model_type": "llama"},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_not_implemented_is_refused(line: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_hf_config(REFUSED[line])
    text = str(caught.value).removeprefix("text_config.")
    assert text.startswith(line), text
    assert "\n" not in text


@pytest.mark.parametrize("config", [M2, m3(), write_hf_config(*small_m3(), dtype="float32")])
def test_extension_changes_theta_and_selection(config: dict[str, Any]) -> None:
    hf = read_hf_config(config)
    assert extend_hf_config(config, hf.model, hf.attention) == config
    hf.model.rope_theta = 2e7
    if hf.family is Family.m3:
        hf.attention.topk, hf.attention.block_size, hf.attention.local_blocks = 32, 64, 2
    assert read_hf_config(extend_hf_config(config, hf.model, hf.attention)) == hf


def test_what_is_said_twice_may_agree() -> None:
    rope = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}
    want = read_hf_config(m3())
    assert read_hf_config(m3(rope_parameters=rope)) == want
    assert read_hf_config(m3(rope_scaling=rope, rope_parameters=rope)) == want
    assert read_hf_config(m3(rope_scaling=None, rope_parameters=rope, rope_theta=None)) == want
    few = M2 | {"num_experts": 256}
    assert read_hf_config(few) == read_hf_config(M2)
    del few["num_local_experts"]
    few["num_experts"] = 128
    assert read_hf_config(few).model.num_experts == 128


def test_fields_can_be_ignored() -> None:
    want = read_hf_config(m3())
    assert (
        read_hf_config(m3(new_field=3, rotary_dim=32), ignore=["new_field", "text_config.rotary_dim"]) == want
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"zero_centered_norm": False}, "model.zero_centered_norm=False: a minimax_m3_vl model has True"),
        ({"shared_expert_hidden_size": 0}, "model.shared_expert_hidden_size=0: "),
        ({"layer_attention": "swa,msa"}, "no released architecture has sliding windows"),
    ],
)
def test_models_without_a_hugging_face_architecture(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        family_of(ModelConfig(**change))
