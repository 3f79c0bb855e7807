"""Counts the parameters of a built model, on any device (meta included)."""

import re
from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel

from msa_train.model.transformer_config import MsaTransformerConfig


@dataclass(slots=True)
class ParameterCount:
    """total: all parameters. active: weights of the layers that one token passes through.

    Active leaves out the embeddings, the output layer and the index branch, and counts the chosen experts
    only. So counted, M2 has 9.8B as published.
    """

    total: int
    active: int


def count_parameters(model: GPTModel) -> ParameterCount:
    """Count a model that is whole on this rank (no tensor, pipeline or expert parallelism)."""
    config = model.config
    assert isinstance(config, MsaTransformerConfig), "built by model.gpt.build_model"
    total = active = routed = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if re.match(r"(embedding|output_layer)\.", name) or ".index_branch." in name:
            continue
        if ".experts.local_experts." in name:
            routed += parameter.numel()
        else:
            active += parameter.numel()
    active += routed * config.model.moe_router_topk // config.model.num_experts
    return ParameterCount(total=total, active=active)
