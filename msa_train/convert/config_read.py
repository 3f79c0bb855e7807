"""Translate the config.json of MiniMax-M2 and M3 checkpoints into our configuration of the same model.

Every field is either translated, or checked to have the one value that is implemented here, or known to have
no effect on the weights' meaning. Anything else is refused: a field that is passed over can be another model.
Absent fields have the defaults of transformers 5.23.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from msa_train.config import Activation, AttentionConfig, AttentionKind, ModelConfig, QkNorm
from msa_train.config.text import excerpt
from msa_train.convert.config_fields import SPARSE, SPARSE_FIELDS, Family, Fields
from msa_train.convert.config_rotary import read_rotary

# the largest published models have about 100 layers and 20,000 experts in all
_MAX_LAYERS, _MAX_EXPERTS = 4096, 2**20


@dataclass(kw_only=True, slots=True)
class HfModel:
    """Hold what config.json says about the language model."""

    family: Family
    "released architecture"
    model: ModelConfig
    "its shape"
    attention: AttentionConfig
    "sizes of block selection; defaults where no layer has it"
    max_positions: int = field(default=0, compare=False)
    "max_position_embeddings; 0 where it is not said"
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
        # quantization may be named outside or inside of the language model's object
        fp8_block = fp8_block or _fp8_block(text)
        tied = Fields(config, "", Family.m3, ignore).flag("tie_word_embeddings", False)
        hf = _read_m3(Fields(text, "text_config.", Family.m3, ignore), tied=tied)
    else:
        raise ValueError(
            f"model_type={excerpt(str(kind))}: is not supported; convert minimax_m2, minimax_m3_vl or "
            "minimax_m3_vl_text"
        )
    hf.fp8_block = fp8_block
    return hf


def _read_m2(fields: Fields) -> HfModel:
    layers = _num_layers(fields)
    kinds = fields.values("attn_type_list")
    if kinds is not None and kinds != [1] * layers:
        raise fields.refusal("attn_type_list", kinds, f"must be {layers} times 1, full attention")
    types = fields.values("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise fields.refusal("layer_types", types, f"must be {layers} times full_attention")
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
    # in this order: what is left after both is unknown, and could be another model
    fields.check_fixed()
    fields.check_nothing_left()
    return HfModel(
        family=Family.m2, model=model, attention=AttentionConfig(), max_positions=fields.positions()
    )


def _read_m3(fields: Fields, *, tied: bool) -> HfModel:
    layers = _num_layers(fields)
    sparse = _sparse_fields(fields)
    kinds = _attention_kinds(fields, sparse, layers)
    index = {name: _index_field(fields, name, sparse) for name in SPARSE_FIELDS}
    model = _common(
        fields,
        layers,
        ffn_hidden_size=fields.whole("dense_intermediate_size"),
        num_dense_ffn_layers=_num_dense(fields, layers),
        shared_expert_hidden_size=fields.whole("shared_intermediate_size"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        layer_attention=_attention_text(kinds),
        qk_norm=QkNorm.head,
        zero_centered_norm=True,
        activation=Activation.swiglu_oai,
    )
    # of a vision-language model, the outer object may say it for the language model inside
    model.tie_embeddings = model.tie_embeddings or tied
    # a model of full attention may have any index sizes: they mean nothing
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
    return HfModel(family=Family.m3, model=model, attention=attention, max_positions=fields.positions())


def _num_layers(fields: Fields) -> int:
    """Take the number of layers, so few that lists of them, and of their experts, are no burden."""
    layers = fields.whole("num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise fields.refusal("num_hidden_layers", layers, f"must be at most {_MAX_LAYERS:,}")
    return layers


def _num_experts(fields: Fields, layers: int) -> int:
    """Take the number of experts of a layer, a field that has two names."""
    # null is a value that is refused later, so absence needs a mark of its own
    absent = object()
    one, other = fields.left.pop("num_local_experts", absent), fields.left.pop("num_experts", absent)
    if absent not in (one, other) and one != other:
        raise fields.refusal(
            "num_experts", other, f"num_local_experts says {one}; correct whichever is wrong"
        )
    given = other if one is absent else one
    name = "num_experts" if one is absent else "num_local_experts"
    experts = fields.as_whole(name, fields.default("num_local_experts") if given is absent else given)
    if layers * experts > _MAX_EXPERTS:
        raise fields.refusal(name, experts, f"must be at most {_MAX_EXPERTS:,} over all {layers} layers")
    return experts


def _common(fields: Fields, layers: int, **special: Any) -> ModelConfig:
    """Make a ModelConfig from the fields that both families have, and those in `special`."""
    topk = fields.whole("num_experts_per_tok")
    # Megatron divides the scores of several experts by their sum and leaves a single one as it is
    if topk == 1:
        raise fields.refusal(
            "num_experts_per_tok", 1, "weights of a single expert differ here; must be 2 or more"
        )
    heads, head_dim = fields.whole("num_attention_heads"), fields.whole("head_dim")
    if layers * heads > _MAX_EXPERTS:
        raise fields.refusal(
            "num_attention_heads", heads, f"must be at most {_MAX_EXPERTS:,} over all layers"
        )
    width = fields.whole("intermediate_size")
    # of no effect on imported weights; an index branch that the checkpoint lacks is drawn with it
    std = fields.number("initializer_range", 0.02)
    return ModelConfig(
        **{"ffn_hidden_size": width} | special,
        name="imported",
        num_layers=layers,
        hidden_size=fields.whole("hidden_size"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads"),
        head_dim=head_dim,
        vocab_size=fields.whole("vocab_size"),
        num_experts=_num_experts(fields, layers),
        moe_router_topk=topk,
        moe_ffn_hidden_size=width,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=std,
        embedding_init_std=std,
        embedding_shared_std=0.0,
        **read_rotary(fields, head_dim),
    )


def _sparse_fields(fields: Fields) -> dict[str, Any]:
    """Take sparse_attention_config, which released checkpoints have, after checking what is fixed."""
    sparse = fields.mapping("sparse_attention_config")
    place = "sparse_attention_config."
    for name, value in {"sparse_init_block": 0, "sparse_score_type": "max"}.items():
        given = sparse.pop(name, None)
        if given is not None and given != value:
            raise fields.refusal(place + name, given, f"is not implemented here; must be {value}")
    uses = sparse.pop("use_sparse_attention", True)
    frequency = fields.as_list(place + "sparse_attention_freq", sparse.get("sparse_attention_freq"))
    if not uses and any(frequency or []):
        raise fields.refusal(place + "use_sparse_attention", uses, "contradicts sparse_attention_freq")
    name = place + "sparse_disable_index_value"
    values = fields.as_list(name, sparse.pop("sparse_disable_index_value", None))
    # both lists have an entry per layer: index values must be disabled wherever attention is sparse
    if any(on and not off for on, off in zip(frequency or [], values or [], strict=False)):
        raise fields.refusal(name, values, "index values are not implemented here")
    known = {*SPARSE_FIELDS.values(), "sparse_attention_freq"}
    for name, value in sparse.items():
        if name not in known and value not in (None, False, 0):
            raise fields.refusal(place + name, value, "this field is not known here and may change the model")
    return sparse


def _index_field(fields: Fields, name: str, sparse: dict[str, Any]) -> int:
    """Take a field of the index branch, which has two spellings, e.g. index_head_dim and sparse_index_dim."""
    absent = object()
    flat, legacy = fields.left.pop(name, absent), sparse.get(SPARSE_FIELDS[name], absent)
    if absent not in (flat, legacy) and flat != legacy:
        raise fields.refusal(name, flat, f"sparse_attention_config says {legacy}; correct whichever is wrong")
    given = flat if legacy is absent else legacy
    return fields.as_whole(name, fields.default(name) if given is absent else given, least=0)


def _attention_kinds(fields: Fields, sparse: dict[str, Any], layers: int) -> list[AttentionKind]:
    # layer_types names every layer; sparse_attention_freq has 1 or 0 for each: [0, 1] is full, msa
    types = fields.values("layer_types")
    if types is None and sparse.get("sparse_attention_freq") is not None:
        types = [SPARSE if on else "full_attention" for on in sparse["sparse_attention_freq"]]
    types = ["full_attention"] * layers if types is None else types
    if len(types) != layers:
        raise fields.refusal("layer_types", types, f"must name {layers} layers")
    kinds = {"full_attention": AttentionKind.full, SPARSE: AttentionKind.msa}
    for kind in types:
        if kind not in kinds:
            raise fields.refusal("layer_types", kind, f"is not implemented here; {' or '.join(kinds)}")
    return [kinds[kind] for kind in types]


def _num_dense(fields: Fields, layers: int) -> int:
    """Take the number of dense layers, which must be the first ones.

    Example: moe_layer_freq [0, 0, 0, 1, 1] -> 3; [0, 1, 0] -> an error.
    """
    types, frequency = fields.values("mlp_layer_types"), fields.values("moe_layer_freq")
    if types is None:
        types = ["sparse" if on else "dense" for on in frequency or [1] * layers]
    if len(types) != layers:
        raise fields.refusal("mlp_layer_types", types, f"must name {layers} layers")
    count = sum(kind == "dense" for kind in types)
    # our configuration has a number of dense layers and no list
    if types != ["dense"] * count + ["sparse"] * (layers - count):
        raise fields.refusal("mlp_layer_types", types, "dense layers must come before all others here")
    return count


def _check_index(fields: Fields, model: ModelConfig, index: dict[str, int]) -> None:
    heads, dim = index["index_n_heads"], index["index_head_dim"]
    if heads != model.num_kv_heads:
        raise fields.refusal("index_n_heads", heads, f"must be num_key_value_heads={model.num_kv_heads}")
    # index queries and keys are rotated like the main branch's, so they need as many channels
    if dim < model.rotary_dim:
        raise fields.refusal(
            "index_head_dim", dim, f"must be at least the rotated channels, {model.rotary_dim}"
        )
    if index["index_local_blocks"] < 1:
        raise fields.refusal("index_local_blocks", index["index_local_blocks"], "must be 1 or more here")


def _attention_text(kinds: list[AttentionKind]) -> str:
    """Write kinds of layers as runs: [full, full, msa] -> "full*2,msa*1"."""
    return ",".join(f"{kind.value}*{len(list(run))}" for kind, run in groupby(kinds))


def _fp8_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Take the block size of 8-bit weights, None for plain ones; other kinds of quantization are refused.

    Example: {"quant_method": "fp8", "weight_block_size": [128, 128]} -> (128, 128).
    """
    for name in ("quantization_config", "quantization"):
        given = config.get(name)
        if not given:
            continue
        values = given if isinstance(given, dict) else {}
        method, block = values.get("quant_method", "unknown"), values.get("weight_block_size")
        if method == "fp8" and isinstance(block, list) and len(block) == 2:
            fields = Fields({}, f"{name}.", Family.m2, ())
            return fields.as_whole("weight_block_size", block[0]), fields.as_whole(
                "weight_block_size", block[1]
            )
        raise ValueError(
            f"{name}.quant_method={excerpt(str(method))}: such weights cannot be trained; use or make a "
            "bf16 checkpoint"
        )
    return None
