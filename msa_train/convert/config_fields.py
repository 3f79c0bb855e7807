"""List the fields of a config.json: their defaults, values that are implemented, those without an effect."""

from collections.abc import Collection
from enum import Enum
from typing import Any

from msa_train.config.text import excerpt

SPARSE = "minimax_m3_sparse"
SPARSE_FIELDS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
"our spelling and transformers' -> that of sparse_attention_config in released checkpoints"

# Of generation, of training elsewhere, or of transformers' own housekeeping
_NO_EFFECT = {
    *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "router_aux_loss_coef", "output_router_logits", "return_dict"),
    *("output_hidden_states", "output_attentions", "is_encoder_decoder", "is_decoder", "id2label"),
    *("label2id", "problem_type", "chunk_size_feed_forward", "_name_or_path", "name_or_path", "prefix"),
    *("tokenizer_class", "task_specific_params", "_attn_implementation", "attn_implementation"),
    *("num_labels", "pretraining_tp", "keys_to_ignore_at_inference"),
    # modules that predict several tokens: their weights have no place here, which the list of tensors says
    *("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "num_nextn_predict_layers"),
    # looked at before the other fields
    *("quantization_config", "quantization"),
}


_LARGEST = 1e30
"above all sensible numbers, and below what fp32 holds"


class Family(Enum):
    """Name the released architectures."""

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


class Fields:
    """Take the fields of one config.json, each once; what is left over is refused.

    Numbers, texts and lists are taken as what they are: "64", true and null are no numbers, in transformers
    neither.

    Args:
        values: content of the object.
        place: where it stands, e.g. "text_config.", for messages.
        family: whose defaults and fixed values hold.
        ignore: fields to treat as absent.
    """

    def __init__(self, values: dict[str, Any], place: str, family: Family, ignore: Collection[str]) -> None:
        # a user may name a field by its path, text_config.x, or by itself
        ignored = {name.removeprefix(place) for name in ignore} | _NO_EFFECT
        self.left = {name: value for name, value in values.items() if name not in ignored}
        self.place, self.family = place, family
        # of no effect on the weights, but what some fields are derived from where they are absent
        self.max_positions = values.get("max_position_embeddings")

    def default(self, name: str, default: Any = None) -> Any:
        """Return what an absent field means."""
        return _DEFAULTS[self.family].get(name, default)

    def whole(self, name: str, *, least: int = 1) -> int:
        """Take a whole number that has a default."""
        return self.as_whole(name, self.left.pop(name, self.default(name)), least=least)

    def as_whole(self, name: str, value: Any, *, least: int = 1) -> int:
        """Return the value of a field as a size, below 2^31; True and 64.0 are no sizes.

        Raises:
            ValueError: for anything else.
        """
        # type() and not isinstance: true is an int in Python
        if type(value) is not int or not least <= value < 2**31:
            raise self.refusal(name, value, f"must be a whole number from {least} on")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """Take a finite number above another one."""
        return self.as_number(name, self.left.pop(name, self.default(name, default)), above=above)

    def as_number(self, name: str, value: Any, *, above: float = 0.0) -> float:
        """Return the value of a field as a finite number."""
        if type(value) not in (int, float) or not above < value < _LARGEST:
            raise self.refusal(name, value, f"must be a number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Take a field that is true or false."""
        value = self.left.pop(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "must be true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Take a copy of an object, empty where it is absent or null."""
        value = self.left.pop(name, None)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, value, "must be an object")
        return dict(value or {})

    def values(self, name: str) -> list[Any] | None:
        """Take a list, None where it is absent or null."""
        return self.as_list(name, self.left.pop(name, None))

    def as_list(self, name: str, value: Any) -> list[Any] | None:
        """Return the value of a field as a list of texts and numbers."""
        if value is not None and (
            not isinstance(value, list) or any(type(one) in (list, dict) for one in value)
        ):
            raise self.refusal(name, value, "must be a list of an entry per layer")
        return value

    def refusal(self, name: str, value: Any, rule: str) -> ValueError:
        """Make the error for a field: `name=value: rule`."""
        return ValueError(f"{self.place}{excerpt(name, 80)}={excerpt(str(value), 80)}: {rule}")

    def positions(self) -> int:
        """Return max_position_embeddings, 0 where they are absent or no size."""
        return self.max_positions if type(self.max_positions) is int and self.max_positions > 0 else 0

    def check_fixed(self) -> None:
        """Refuse other values than the one that is implemented."""
        for name, allowed in (_FIXED_IN_BOTH | _FIXED[self.family]).items():
            # absent or null means the default, which is the implemented value
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
                    value,
                    "this field is not known here and may change the model; if it does not, "
                    f"--ignore-field {excerpt(name, 80)}",
                )
