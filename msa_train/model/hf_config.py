"""config.json of MiniMax-M2 and M3 checkpoints, and our configuration of the same model.

Every field is either translated, or checked to have the one value that is implemented here, or known to have
no effect on the weights' meaning. Anything else is refused: a field that is passed over can be another model.
Absent fields have the defaults of transformers 5.23.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from msa_train.config import Activation, AttentionConfig, AttentionKind, ModelConfig, QkNorm
from msa_train.model.hf_config_fields import SPARSE, SPARSE_FIELDS, Family, Fields

_ROPE_THETA = 5000000.0


@dataclass(kw_only=True, slots=True)
class HfModel:
    """What config.json says about the language model."""

    family: Family
    model: ModelConfig
    attention: AttentionConfig
    fp8_block: tuple[int, int] | None = None
    "rows and columns that share a scale, in a checkpoint of 8-bit weights"


def read_hf_config(config: dict[str, Any], *, ignore: Collection[str] = ()) -> HfModel:
    """Translate a config.json.

    Args:
        config: its content: `minimax_m2`, `minimax_m3_vl` (its text_config) or `minimax_m3_vl_text`.
        ignore: fields to treat as absent.

    Raises:
        ValueError: one line, for a value that is not implemented here.
    """
    kind = config.get("model_type")
    fp8_block = _fp8_block(config)
    if kind == "minimax_m2":
        hf = _read_m2(Fields(config, "", Family.m2, ignore))
    elif kind == "minimax_m3_vl_text":
        hf = _read_m3(Fields(config, "", Family.m3, ignore), tied=False)
    elif kind == "minimax_m3_vl":
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ValueError("text_config: is not there; a minimax_m3_vl config.json has one")
        fp8_block = fp8_block or _fp8_block(text)
        tied = bool(config.get("tie_word_embeddings", False))
        hf = _read_m3(Fields(text, "text_config.", Family.m3, ignore), tied=tied)
    else:
        raise ValueError(
            f"model_type={kind}: is not supported; convert minimax_m2, minimax_m3_vl or minimax_m3_vl_text"
        )
    hf.fp8_block = fp8_block
    return hf


def _read_m2(fields: Fields) -> HfModel:
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


def _read_m3(fields: Fields, *, tied: bool) -> HfModel:
    layers = int(fields.take("num_hidden_layers"))
    sparse = _sparse_fields(fields)
    kinds = _attention_kinds(fields, sparse, layers)
    index = {name: _index_field(fields, name, sparse) for name in SPARSE_FIELDS}
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


def _common(fields: Fields, layers: int, **special: Any) -> ModelConfig:
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


def _rotary(fields: Fields, head_dim: int) -> dict[str, Any]:
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


def _sparse_fields(fields: Fields) -> dict[str, Any]:
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
    known = {*SPARSE_FIELDS.values(), "sparse_attention_freq"}
    for name, value in sparse.items():
        if name not in known and value not in (None, False, 0):
            raise fields.refusal(place + name, value, "this field is not known here and may change the model")
    return sparse


def _index_field(fields: Fields, name: str, sparse: dict[str, Any]) -> int:
    """A field of the index branch, which may be spelled in two ways."""
    flat, legacy = fields.left.pop(name, None), sparse.get(SPARSE_FIELDS[name])
    if flat is not None and legacy is not None and flat != legacy:
        raise fields.refusal(name, flat, f"sparse_attention_config says {legacy}; correct whichever is wrong")
    given = legacy if legacy is not None else flat
    return int(fields.default(name) if given is None else given)


def _attention_kinds(fields: Fields, sparse: dict[str, Any], layers: int) -> list[AttentionKind]:
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


def _num_dense(fields: Fields, layers: int) -> int:
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


def _check_index(fields: Fields, model: ModelConfig, index: dict[str, int]) -> None:
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


def _fp8_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Block size of 8-bit weights, None for plain ones; other kinds of quantization are refused."""
    for name in ("quantization_config", "quantization"):
        given = config.get(name)
        if not given:
            continue
        values = given if isinstance(given, dict) else {}
        method, block = values.get("quant_method", "unknown"), values.get("weight_block_size")
        if method == "fp8" and isinstance(block, list) and len(block) == 2:
            return int(block[0]), int(block[1])
        raise ValueError(
            f"{name}.quant_method={method}: such weights cannot be trained; use or make a bf16 checkpoint"
        )
    return None
