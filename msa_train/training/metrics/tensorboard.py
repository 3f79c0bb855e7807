"""Name, group and split the figures of a step for TensorBoard."""

from collections.abc import Iterator, Mapping
from typing import Any

# TensorBoard tags; @ is where "layer03" or "layer03_group1" goes, and vanishes for a single number.
TAGS = {
    "lm_loss": "loss/lm",
    "kl_loss": "loss/kl_@",
    "val_loss": "loss/validation",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens": "data/tokens",
    "padding_share": "data/padding_share",
    "tokens_per_s": "speed/tokens_per_s",
    "step_time_s": "speed/step_time_s",
    "kv_selected_fraction": "exchange/f_@",
    "f": "exchange/f_@",
    "exposed_s": "exchange/exposed_s_@",
    "auto_selected": "exchange/auto_selected_@",
    "tokens_per_expert_min": "moe/@_tokens_per_expert_min",
    "tokens_per_expert_mean": "moe/@_tokens_per_expert_mean",
    "tokens_per_expert_max": "moe/@_tokens_per_expert_max",
    "router_bias_min": "moe/@_router_bias_min",
    "router_bias_max": "moe/@_router_bias_max",
    "block_recall": "attention/block_recall_@",
    "score_recall": "attention/score_recall_@",
    "score_recall_best": "attention/score_recall_best_@",
    "attention_entropy": "attention/entropy_@",
    "block_recall_by_distance": "attention_distance/block_recall_@",
    "score_recall_by_distance": "attention_distance/score_recall_@",
}


# Groups of keys without a tag of their own, by how the key starts
_GROUPS = {
    "memory": "memory",
    "val_": "loss",
    "kv_": "exchange",
    "full_kv_": "exchange",
    "full_query_": "exchange",
    "index_key_": "exchange",
    "index_query_": "exchange",
    "request_": "exchange",
    "router": "moe",
    "tokens_per_expert": "moe",
    "padding": "data",
    "checkpoint": "checkpoint",
    "skipped": "optim",
    "rollbacks": "optim",
    "passed_over": "data",
}


_OTHER = "other"


# Charts of the Custom Scalars page; tags are regular expressions.
CHARTS = {
    "training": {
        "loss": ["Multiline", ["loss/lm$", "loss/validation$"]],
        "KL loss of the index branch": ["Multiline", ["loss/kl"]],
        "gradient norm": ["Multiline", ["optim/grad_norm$"]],
        "learning rate": ["Multiline", ["optim/lr$"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_s$"]],
        "padding": ["Multiline", ["data/padding_share$"]],
    },
    "key/value exchange": {
        "f: share of remote blocks selected, per layer and group": ["Multiline", ["exchange/f(_|$)"]],
        "bytes moved, and what an all-gather would move": ["Multiline", ["exchange/kv_bytes"]],
        "seconds that a rank waits, by purpose": ["Multiline", ["exchange/exposed_s"]],
    },
    "selection against full attention": {
        "block recall": ["Multiline", ["attention/block_recall(_layer|$)"]],
        "score recall, and that of the best blocks": [
            "Multiline",
            ["attention/score_recall(_best)?(_layer|$)"],
        ],
        "attention entropy (nats)": ["Multiline", ["attention/entropy(_layer|$)"]],
        "block recall by distance in blocks": ["Multiline", ["attention_distance/block_recall"]],
        "score recall of the best blocks by distance": ["Multiline", ["attention_distance/score_recall"]],
    },
    "experts": {
        "tokens of the busiest expert, per layer": ["Multiline", ["moe/.*tokens_per_expert_max$"]],
        "tokens of the idlest expert, per layer": ["Multiline", ["moe/.*tokens_per_expert_min$"]],
        "router bias, per layer": ["Multiline", ["moe/.*router_bias_(min|max)$"]],
    },
    "machine": {"memory": ["Multiline", ["memory/.*"]]},
}


def scalars(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """TensorBoard tags and numbers of one value.

    Example: f={"layer03": [0.1, 0.2]}, or f=[None, None, [0.1, 0.2]] -> exchange/f_layer03_group0 0.1 and
    exchange/f_layer03_group1 0.2. block_recall_by_distance={"layer03": {"distance4": 0.5}} ->
    attention_distance/block_recall_layer03_distance4 0.5.
    """
    if isinstance(value, list | tuple):
        value = {f"layer{index + 1:02d}": entry for index, entry in enumerate(value)}
    entries = value.items() if isinstance(value, Mapping) else [("", value)]
    for name, entry in entries:
        if isinstance(entry, list | tuple):
            numbers = [(f"{name}_group{group}", number) for group, number in enumerate(entry)]
        elif isinstance(entry, Mapping):
            numbers = [(f"{name}_{part}", number) for part, number in entry.items()]
        else:
            numbers = [(name, entry)]
        for index, number in numbers:
            if number is not None and not isinstance(number, str):
                yield _tag(key, index), float(number)


def _tag(key: str, index: str) -> str:
    key = key.removesuffix("_by_layer").removesuffix("_by_purpose")
    tag = TAGS.get(key)
    if tag is None:
        group = next((group for start, group in _GROUPS.items() if key.startswith(start)), _OTHER)
        tag = f"{group}/{key}_@"
    if index:
        return tag.replace("@", index) if "@" in tag else f"{tag}_{index}"
    return tag.replace("_@", "").replace("@_", "")
