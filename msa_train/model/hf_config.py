"""config.json of MiniMax-M2 and M3 checkpoints, and our configuration of the same model.

Every field is either translated, or checked to have the one value that is implemented here, or known to have
no effect on the weights' meaning. Anything else is refused: a field that is passed over can be another model.
Absent fields have the defaults of transformers 5.23.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Any

from msa_train.config import Activation, AttentionConfig, AttentionKind, ModelConfig, QkNorm

SPARSE = "minimax_m3_sparse"
DEFAULT_MAX_POSITIONS = 1048576
_ROPE_THETA = 5000000.0

# Of generation, training elsewhere, or transformers' own housekeeping
_NO_EFFECT = {
    *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "router_aux_loss_coef", "output_router_logits", "return_dict"),
    *(
        "output_hidden_states",
        "output_attentions",
        "is_encoder_decoder",
        "is_decoder",
        "id2label",
        "label2id",
    ),
    *(
        "problem_type",
        "chunk_size_feed_forward",
        "_name_or_path",
        "name_or_path",
        "tokenizer_class",
        "prefix",
    ),
    *("task_specific_params", "_attn_implementation", "attn_implementation", "num_labels", "pretraining_tp"),
    # modules for predicting several tokens: their weights have no place here, which the tensor list says
    *("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "num_nextn_predict_layers"),
    "keys_to_ignore_at_inference",
}
_SPARSE_FIELDS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}


class Family(Enum):
    """Which of the released architectures a model is."""

    m2 = "minimax_m2"
    m3 = "minimax_m3_vl"


_DEFAULTS: dict[Family, dict[str, Any]] = {
    Family.m2: {
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
    },
    Family.m3: {
        "vocab_size": 200064,
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "num_hidden_layers": 60,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072,
        "routed_scaling_factor": 2.0,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "index_local_blocks": 1,
    },
}
# The one value that is implemented, for each family
_FIXED: dict[Family, dict[str, tuple[Any, ...]]] = {
    Family.m2: {
        "hidden_act": ("silu",),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
        "routed_scaling_factor": (1.0,),
        "use_gemma_norm": (False,),
    },
    Family.m3: {
        # transformers computes swigluoai whatever is written here
        "hidden_act": ("swigluoai", "silu"),
        "qk_norm_type": ("per_head",),
        "use_gemma_norm": (True,),
        "n_shared_experts": (1,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
    },
}
_FIXED_IN_BOTH: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "router_jitter_noise": (0.0,),
    "attention_bias": (False,),
    "attention_output_gate": (False,),
    "use_qk_norm": (True,),
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "norm_topk_prob": (True,),
    "sliding_window": (None,),
}


@dataclass(kw_only=True, slots=True)
class HfModel:
    """What config.json says about the language model."""

    family: Family
    model: ModelConfig
    attention: AttentionConfig


def read_hf_config(config: dict[str, Any], *, ignore: Collection[str] = ()) -> HfModel:
    """Translate a config.json.

    Args:
        config: its content: `minimax_m2`, `minimax_m3_vl` (its text_config) or `minimax_m3_vl_text`.
        ignore: fields to treat as absent.

    Raises:
        ValueError: one line, for a value that is not implemented here.
    """
    kind = config.get("model_type")
    _refuse_quantized(config)
    if kind == "minimax_m2":
        return _read_m2(_Fields(config, "", Family.m2, ignore))
    if kind == "minimax_m3_vl_text":
        return _read_m3(_Fields(config, "", Family.m3, ignore), tied=False)
    if kind == "minimax_m3_vl":
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ValueError("text_config: is not there; a minimax_m3_vl config.json has one")
        _refuse_quantized(text)
        tied = bool(config.get("tie_word_embeddings", False))
        return _read_m3(_Fields(text, "text_config.", Family.m3, ignore), tied=tied)
    raise ValueError(
        f"model_type={kind}: is not supported; convert minimax_m2, minimax_m3_vl or minimax_m3_vl_text"
    )


class _Fields:
    """The fields of one config.json, each taken once; what is left over is refused."""

    def __init__(self, values: dict[str, Any], place: str, family: Family, ignore: Collection[str]) -> None:
        ignored = {name.removeprefix(place) for name in ignore} | _NO_EFFECT
        self.left = {name: value for name, value in values.items() if name not in ignored}
        self.place, self.family = place, family

    def take(self, name: str, default: Any = None) -> Any:
        """Value of a field, or its default."""
        value = self.left.pop(name, None)
        return self.default(name, default) if value is None else value

    def default(self, name: str, default: Any = None) -> Any:
        """What an absent field means."""
        return _DEFAULTS[self.family].get(name, default)

    def refusal(self, name: str, value: Any, rule: str) -> ValueError:
        """The error for a field."""
        return ValueError(f"{self.place}{name}={value}: {rule}")

    def check_fixed(self) -> None:
        """Refuse other values than the one that is implemented."""
        for name, allowed in (_FIXED_IN_BOTH | _FIXED[self.family]).items():
            value = self.left.pop(name, None)
            if value is not None and value not in allowed:
                raise self.refusal(
                    name, value, f"is not implemented here; must be {' or '.join(map(str, allowed))}"
                )

    def check_nothing_left(self) -> None:
        """Refuse fields that nobody asked for, unless they are empty or off."""
        for name, value in self.left.items():
            if value not in (None, False, 0, "", [], {}):
                raise self.refusal(
                    name,
                    str(value)[:60],
                    "this field is not known here and may change the model; if it does not, "
                    f"--ignore-field {name}",
                )


def _read_m2(fields: _Fields) -> HfModel:
    layers = int(fields.take("num_hidden_layers"))
    kinds = fields.take("attn_type_list", [1] * layers)
    if list(kinds) != [1] * layers:
        raise fields.refusal("attn_type_list", str(kinds)[:60], f"must be {layers} times 1, full attention")
    types = fields.take("layer_types", ["full_attention"] * layers)
    if list(types) != ["full_attention"] * layers:
        raise fields.refusal("layer_types", str(types)[:60], f"must be {layers} times full_attention")
    model = _common(
        fields,
        layers,
        num_dense_ffn_layers=0,
        shared_expert_hidden_size=0,
        routed_scaling_factor=1.0,
        layer_attention="full",
        qk_norm=QkNorm.width,
        zero_centered_norm=False,
        activation=Activation.swiglu,
    )
    fields.check_fixed()
    fields.check_nothing_left()
    return HfModel(family=Family.m2, model=model, attention=AttentionConfig())


def _read_m3(fields: _Fields, *, tied: bool) -> HfModel:
    layers = int(fields.take("num_hidden_layers"))
    sparse = _sparse_fields(fields)
    kinds = _attention_kinds(fields, sparse, layers)
    index = {name: _index_field(fields, name, sparse) for name in _SPARSE_FIELDS}
    model = _common(
        fields,
        layers,
        ffn_hidden_size=int(fields.take("dense_intermediate_size")),
        num_dense_ffn_layers=_num_dense(fields, layers),
        shared_expert_hidden_size=int(fields.take("shared_intermediate_size")),
        routed_scaling_factor=float(fields.take("routed_scaling_factor")),
        layer_attention=_attention_text(kinds),
        qk_norm=QkNorm.head,
        zero_centered_norm=True,
        activation=Activation.swiglu_oai,
    )
    model.tie_embeddings = model.tie_embeddings or tied
    if AttentionKind.msa in kinds:
        _check_index(fields, model, index)
    fields.check_fixed()
    fields.check_nothing_left()
    attention = AttentionConfig(
        block_size=index["index_block_size"],
        topk=index["index_topk_blocks"],
        local_blocks=index["index_local_blocks"],
        index_head_dim=index["index_head_dim"],
    )
    return HfModel(family=Family.m3, model=model, attention=attention)


def _common(fields: _Fields, layers: int, **special: Any) -> ModelConfig:
    """ModelConfig from the fields that both families have, and those in `special`."""
    topk = int(fields.take("num_experts_per_tok"))
    if topk == 1:
        raise fields.refusal(
            "num_experts_per_tok", 1, "weights of a single expert differ here; must be 2 or more"
        )
    heads, head_dim = int(fields.take("num_attention_heads")), int(fields.take("head_dim"))
    width = int(fields.take("intermediate_size"))
    std = float(fields.take("initializer_range", 0.02))
    # other names of the same fields
    experts = fields.take("num_local_experts")
    fields.left.pop("num_experts", None)
    return ModelConfig(
        **{"ffn_hidden_size": width} | special,
        name="imported",
        num_layers=layers,
        hidden_size=int(fields.take("hidden_size")),
        num_heads=heads,
        num_kv_heads=int(fields.take("num_key_value_heads")),
        head_dim=head_dim,
        vocab_size=int(fields.take("vocab_size")),
        num_experts=int(experts),
        moe_router_topk=topk,
        moe_ffn_hidden_size=width,
        norm_eps=float(fields.take("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(fields.take("tie_word_embeddings", False)),
        init_std=std,
        embedding_init_std=std,
        embedding_shared_std=0.0,
        **_rotary(fields, head_dim),
    )


def _rotary(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """rope_theta and rotary_dim; what is said twice must agree."""
    scaling = dict(fields.take("rope_scaling", {}))
    rope = dict(fields.take("rope_parameters", {})) or scaling
    for name in ("rope_type", "type"):
        kind = rope.pop(name, "default")
        if kind != "default":
            raise fields.refusal(f"rope_parameters.{name}", kind, "is not implemented here; must be default")
    theta = rope.pop("rope_theta", None)
    outer_theta = fields.take("rope_theta")
    factor, outer_factor = rope.pop("partial_rotary_factor", None), fields.take("partial_rotary_factor")
    for name, inner, outer in (
        ("rope_theta", theta, outer_theta),
        ("partial_rotary_factor", factor, outer_factor),
    ):
        if None not in (inner, outer) and inner != outer:
            raise fields.refusal(name, outer, f"rope_parameters say {inner}; correct whichever is wrong")
    if rope:
        name, value = next(iter(rope.items()))
        raise fields.refusal(f"rope_parameters.{name}", value, "is not implemented here; must be absent")
    chosen = factor if factor is not None else outer_factor
    # transformers reads rotary_dim of M2 only; for M3 without a factor it rotates all channels
    dim, by_factor = fields.take("rotary_dim"), None if chosen is None else int(head_dim * chosen)
    used = by_factor
    if used is None:
        used = int(dim) if dim is not None and fields.family is Family.m2 else head_dim
    if dim is not None and int(dim) != used:
        raise fields.refusal(
            "rotary_dim",
            dim,
            f"transformers rotates {used} of {head_dim} channels (partial_rotary_factor={chosen}); correct "
            "whichever is wrong, or --ignore-field rotary_dim",
        )
    return {
        "rope_theta": float(theta if theta is not None else outer_theta or _ROPE_THETA),
        "rotary_dim": used,
    }


def _sparse_fields(fields: _Fields) -> dict[str, Any]:
    """Content of sparse_attention_config, which released checkpoints have, after checking what is fixed."""
    sparse = dict(fields.take("sparse_attention_config", {}))
    place = "sparse_attention_config."
    for name, value in {"sparse_init_block": 0, "sparse_score_type": "max"}.items():
        given = sparse.pop(name, None)
        if given is not None and given != value:
            raise fields.refusal(place + name, given, f"is not implemented here; must be {value}")
    uses = sparse.pop("use_sparse_attention", True)
    if not uses and any(sparse.get("sparse_attention_freq", [])):
        raise fields.refusal(place + "use_sparse_attention", uses, "contradicts sparse_attention_freq")
    values = sparse.pop("sparse_disable_index_value", None)
    frequency = sparse.get("sparse_attention_freq")
    if any(on and not off for on, off in zip(frequency or [], values or [], strict=False)):
        raise fields.refusal(
            place + "sparse_disable_index_value", str(values)[:60], "index values are not implemented here"
        )
    known = {*_SPARSE_FIELDS.values(), "sparse_attention_freq"}
    for name, value in sparse.items():
        if name not in known and value not in (None, False, 0):
            raise fields.refusal(place + name, value, "this field is not known here and may change the model")
    return sparse


def _index_field(fields: _Fields, name: str, sparse: dict[str, Any]) -> int:
    """A field of the index branch, which may be spelled in two ways."""
    flat, legacy = fields.left.pop(name, None), sparse.get(_SPARSE_FIELDS[name])
    if flat is not None and legacy is not None and flat != legacy:
        raise fields.refusal(name, flat, f"sparse_attention_config says {legacy}; correct whichever is wrong")
    given = legacy if legacy is not None else flat
    return int(fields.default(name) if given is None else given)


def _attention_kinds(fields: _Fields, sparse: dict[str, Any], layers: int) -> list[AttentionKind]:
    types = fields.take("layer_types")
    if types is None and sparse.get("sparse_attention_freq") is not None:
        types = [SPARSE if on else "full_attention" for on in sparse["sparse_attention_freq"]]
    types = ["full_attention"] * layers if types is None else list(types)
    if len(types) != layers:
        raise fields.refusal("layer_types", str(types)[:60], f"must name {layers} layers")
    kinds = {"full_attention": AttentionKind.full, SPARSE: AttentionKind.msa}
    for kind in types:
        if kind not in kinds:
            raise fields.refusal("layer_types", kind, f"is not implemented here; {' or '.join(kinds)}")
    return [kinds[kind] for kind in types]


def _num_dense(fields: _Fields, layers: int) -> int:
    """Number of dense layers, which must be the first ones."""
    types, frequency = fields.take("mlp_layer_types"), fields.take("moe_layer_freq")
    if types is None:
        types = ["sparse" if on else "dense" for on in frequency or [1] * layers]
    if len(types) != layers:
        raise fields.refusal("mlp_layer_types", str(types)[:60], f"must name {layers} layers")
    count = sum(kind == "dense" for kind in types)
    if list(types) != ["dense"] * count + ["sparse"] * (layers - count):
        raise fields.refusal(
            "mlp_layer_types", str(types)[:60], "dense layers must come before all others here"
        )
    return count


def _check_index(fields: _Fields, model: ModelConfig, index: dict[str, int]) -> None:
    heads, dim = index["index_n_heads"], index["index_head_dim"]
    if heads != model.num_kv_heads:
        raise fields.refusal("index_n_heads", heads, f"must be num_key_value_heads={model.num_kv_heads}")
    if dim < model.rotary_dim:
        raise fields.refusal(
            "index_head_dim", dim, f"must be at least the rotated channels, {model.rotary_dim}"
        )
    if index["index_local_blocks"] < 1:
        raise fields.refusal("index_local_blocks", index["index_local_blocks"], "must be 1 or more here")


def _attention_text(kinds: list[AttentionKind]) -> str:
    """[full, full, msa] -> "full*2,msa*1"."""
    return ",".join(f"{kind.value}*{len(list(run))}" for kind, run in groupby(kinds))


def _refuse_quantized(config: dict[str, Any]) -> None:
    for name in ("quantization_config", "quantization"):
        if config.get(name):
            method = (
                config[name].get("quant_method", "unknown") if isinstance(config[name], dict) else "unknown"
            )
            raise ValueError(
                f"{name}.quant_method={method}: quantized weights cannot be trained; use or make a bf16 "
                "checkpoint"
            )


def family_of(model: ModelConfig) -> Family:
    """The released architecture that a model of ours has.

    Raises:
        ValueError: one line, naming the first setting that none of them has.
    """
    family = Family.m3 if model.activation is Activation.swiglu_oai else Family.m2
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
    """config.json of a model of ours: minimax_m2, or the bare text model of minimax_m3_vl.

    Args:
        model, attention: the shape.
        dtype: of the weights, as transformers writes it, e.g. "bfloat16".
        max_positions: longest sequence that the model is meant for.

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
            "rope_type": "default",
            "rope_theta": model.rope_theta,
            "partial_rotary_factor": _partial_factor(model.rotary_dim, model.head_dim),
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
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
    config: dict[str, Any], model: ModelConfig, attention: AttentionConfig
) -> dict[str, Any]:
    """A config.json with what a long-context extension may change: rope_theta and the selection's sizes.

    Args:
        config: of the model that was extended; stays as it is.
        model, attention: our configuration after the extension.
    """
    result: dict[str, Any] = json.loads(json.dumps(config))
    text = result["text_config"] if isinstance(result.get("text_config"), dict) else result
    for place in (text, text.get("rope_parameters"), text.get("rope_scaling")):
        if isinstance(place, dict) and place.get("rope_theta") is not None:
            place["rope_theta"] = _like(model.rope_theta, place["rope_theta"])
    values = {
        "index_block_size": attention.block_size,
        "index_topk_blocks": attention.topk,
        "index_local_blocks": attention.local_blocks,
    }
    sparse = text.get("sparse_attention_config") or {}
    for name, value in values.items():
        for place, field in ((text, name), (sparse, _SPARSE_FIELDS[name])):
            if place.get(field) is not None:
                place[field] = value
    return result


def _like(value: float, given: float) -> float:
    """The value as it is given where both are equal: 5000000 stays a whole number."""
    return given if given == value else value


def _partial_factor(rotary_dim: int, head_dim: int) -> float:
    """A factor that gives rotary_dim back when it is multiplied and cut to a whole number (29 of 100!)."""
    factor = rotary_dim / head_dim
    while int(head_dim * factor) < rotary_dim:
        factor = math.nextafter(factor, 2.0)
    return factor


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
