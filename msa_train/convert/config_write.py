"""Write the config.json of a model of ours."""

import json
import math
from enum import Enum
from typing import Any

from msa_train.config import Activation, AttentionConfig, AttentionKind, ModelConfig, QkNorm
from msa_train.convert.config_fields import SPARSE, SPARSE_FIELDS, Family
from msa_train.convert.config_rotary import extend_rotary, write_rotary

DEFAULT_MAX_POSITIONS = 1048576


def family_of(model: ModelConfig) -> Family:
    """Find the released architecture that a model of ours has.

    Raises:
        ValueError: one line, naming the first setting that none of them has.
    """
    # the activation is what the two architectures never share
    family = Family.m3 if model.activation is Activation.swiglu_oai else Family.m2
    # settings that the configuration of ours leaves open and the architecture fixes
    needed: dict[str, Any] = {"qk_norm": QkNorm.head, "zero_centered_norm": True}
    if family is Family.m2:
        needed = {
            "qk_norm": QkNorm.width,
            "zero_centered_norm": False,
            "num_dense_ffn_layers": 0,
            "shared_expert_hidden_size": 0,
            "routed_scaling_factor": 1.0,
        }
    for name, value in needed.items():
        given = getattr(model, name)
        if given != value:
            raise ValueError(
                f"model.{name}={_plain(given)}: a {family.value} model has {_plain(value)}; no Hugging Face "
                f"architecture has this together with model.activation={model.activation.value}"
            )
    if AttentionKind.swa in model.attention_kinds():
        raise ValueError(
            f"model.layer_attention={model.layer_attention}: no released architecture has sliding windows"
        )
    if family is Family.m2 and AttentionKind.msa in model.attention_kinds():
        raise ValueError(
            f"model.layer_attention={model.layer_attention}: a minimax_m2 model has full attention only"
        )
    if family is Family.m3 and not model.shared_expert_hidden_size:
        raise ValueError("model.shared_expert_hidden_size=0: a minimax_m3_vl model has a shared expert")
    return family


def write_hf_config(
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    dtype: str,
    max_positions: int = DEFAULT_MAX_POSITIONS,
) -> dict[str, Any]:
    """Write the config.json of a model of ours: minimax_m2, or the bare text model of minimax_m3_vl.

    Args:
        model, attention: the shape.
        dtype: of the weights, as transformers writes it, e.g. "bfloat16".
        max_positions: longest sequence that the model is meant for, tokens.

    Raises:
        ValueError: if no released architecture is like it.
    """
    family = family_of(model)
    result: dict[str, Any] = {
        "architectures": ["MiniMaxM2ForCausalLM" if family is Family.m2 else "MiniMaxM3VLForCausalLM"],
        "model_type": "minimax_m2" if family is Family.m2 else "minimax_m3_vl_text",
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        # transformers computes M3's clamped activation whatever stands here
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "num_experts_per_tok": model.moe_router_topk,
        "num_local_experts": model.num_experts,
        "rotary_dim": model.rotary_dim,
        "rope_parameters": {
            **write_rotary(model),
            # transformers multiplies this by head_dim and cuts, see _partial_factor
            "partial_rotary_factor": _partial_factor(model.rotary_dim, model.head_dim),
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    # transformers has these fields for M3 alone; the activation's constants are those of options.Activation
    if family is Family.m3:
        dense = model.num_dense_ffn_layers
        kinds = {AttentionKind.full: "full_attention", AttentionKind.msa: SPARSE}
        result |= {
            "dense_intermediate_size": model.ffn_hidden_size,
            "shared_intermediate_size": model.shared_expert_hidden_size,
            "routed_scaling_factor": model.routed_scaling_factor,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "layer_types": [kinds[kind] for kind in model.attention_kinds()],
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (model.num_layers - dense),
            "index_n_heads": model.num_kv_heads,
            "index_head_dim": attention.index_head_dim,
            "index_block_size": attention.block_size,
            "index_topk_blocks": attention.topk,
            "index_local_blocks": attention.local_blocks,
        }
    return result


def extend_hf_config(
    config: dict[str, Any], model: ModelConfig, attention: AttentionConfig, *, max_positions: int = 0
) -> dict[str, Any]:
    """Change in a config.json what a long-context extension may: positions, RoPE and the selection's sizes.

    Args:
        config: of the model that was extended; stays as it is.
        model, attention: our configuration after the extension.
        max_positions: for max_position_embeddings; 0: as they are.
    """
    # a deep copy, of what is JSON anyway
    result: dict[str, Any] = json.loads(json.dumps(config))
    text = result["text_config"] if isinstance(result.get("text_config"), dict) else result
    extend_rotary(text, model)
    if max_positions:
        text["max_position_embeddings"] = max_positions
    values = {
        "index_block_size": attention.block_size,
        "index_topk_blocks": attention.topk,
        "index_local_blocks": attention.local_blocks,
    }
    sparse = text.get("sparse_attention_config") or {}
    for name, value in values.items():
        # in whichever spelling the config.json has them, and nowhere that it does not
        for place, field in ((text, name), (sparse, SPARSE_FIELDS[name])):
            if place.get(field) is not None:
                place[field] = value
    return result


def _partial_factor(rotary_dim: int, head_dim: int) -> float:
    """Find a factor that gives rotary_dim back when it is multiplied and cut to a whole number.

    Example: 29 / 100 = 0.29 in float64 gives int(100 * 0.29) = 28; the next float above it gives 29.
    """
    factor = rotary_dim / head_dim
    # a float too small by its last bit is mended by its next neighbour, so this runs once or never
    while int(head_dim * factor) < rotary_dim:
        factor = math.nextafter(factor, 2.0)
    return factor


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
