"""Build the model: layer specs by configuration, and a GPTModel whose loss never forms all logits."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from msa_train.config import AttentionKind, RunConfig, longest_seq_len
from msa_train.data import IGNORE_LABEL
from msa_train.model.attention.base import AttentionSubmodules
from msa_train.model.attention.full import FullSelfAttention
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.attention.sliding_window import WindowSelfAttention
from msa_train.model.extra_states import load_without_extra_states, without_extra_states
from msa_train.model.head_observer import HeadObserver
from msa_train.model.implementation import layer_classes
from msa_train.model.layers.cross_entropy import linear_cross_entropy
from msa_train.model.layers.fused_gate import FusedGate
from msa_train.model.layers.moe import ExpertLayer, SigmoidRouter
from msa_train.model.layers.moe.experts import GroupedExperts
from msa_train.model.layers.moe.feed_forward import FeedForward
from msa_train.model.transformer_config import (
    MsaTransformerConfig,
    attention_kind,
    build_transformer_config,
)
from msa_train.model.transformer_layer import MsaTransformerLayer

_ATTENTION = {
    AttentionKind.full: FullSelfAttention,
    AttentionKind.msa: MsaSelfAttention,
    AttentionKind.swa: WindowSelfAttention,
}


class MsaGptModel(GPTModel):
    """Run Megatron's GPTModel; with labels it returns the loss of each token, [T] fp32 in nats.

    Nothing is divided here: the engine divides the sum by the labels of the whole step, over all packs and
    data-parallel ranks, so that every token weighs the same however packs are dealt and cut.
    """

    observer: HeadObserver | None = None
    "computes the loss in evaluations that look at single tokens"

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            # Each rank's loss has the gradient from its own words; backward, this sums it over the ranks.
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert weight is not None, "the last stage has the output weight"
        assert isinstance(self.config, MsaTransformerConfig), "built here"
        if self.observer is not None:
            return self.observer.losses(hidden.squeeze(1), weight, labels.squeeze(0), group)
        is_fused = self.config.is_fused
        return linear_cross_entropy(
            hidden.squeeze(1), weight, labels.squeeze(0), IGNORE_LABEL, group, is_fused=is_fused
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Make the checkpoint entries, the same whosever linear layers and norms the model is built of."""
        return without_extra_states(super().sharded_state_dict(*args, **kwargs))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and buffers; extra states are neither needed nor taken, see `extra_states`."""
        return load_without_extra_states(super().load_state_dict, state_dict, strict=strict, assign=assign)


def build_model(
    config: RunConfig,
    pg_collection: ProcessGroupCollection,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    megatron: MsaTransformerConfig | None = None,
    vp_stage: int | None = None,
) -> MsaGptModel:
    """Build the part of the model that this rank holds, weights not initialised (see `init_weights`).

    Args:
        config: the run.
        pg_collection: process groups of this rank.
        pre_process: this pipeline stage has the embedding.
        post_process: this pipeline stage has the output layer.
        megatron: of the run, shared by all chunks of a rank; None: made here, for one even stage per rank.
        vp_stage: number of the model chunk on this rank; None: the rank has one chunk.
    """
    # Megatron warns about every layer class that is not its own, and from 0.19 on about GPTModel itself.
    for name in ("megatron.core.transformer.transformer_layer", "megatron.core.models.gpt.gpt_model"):
        logging.getLogger(name).setLevel(logging.ERROR)
    megatron = megatron or build_transformer_config(config)
    model = MsaGptModel(
        config=megatron,
        transformer_layer_spec=_block_spec(  # type: ignore[arg-type]
            megatron, pg_collection.pp.rank(), vp_stage
        ),
        vocab_size=config.model.vocab_size,
        max_sequence_length=longest_seq_len(config),
        pre_process=pre_process,
        post_process=post_process,
        # The vocabulary stays cut; our loss merges the parts.
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        # Rotary embedding happens inside our attention, from the pack's document positions.
        position_embedding_type="none",
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    _mark_parallel_weights(model)
    return model


def _mark_parallel_weights(model: MsaGptModel) -> None:
    """Mark the dimension of a weight that is cut over tensor-parallel ranks, and the weights of experts.

    Megatron-core 0.16 marks cuts while it draws initial weights, which we leave out (`init_weights` draws
    them by name); its gradient norm and our drawing need the marks. Without expert parallelism it marks
    experts as ordinary weights and would not sum their gradients over tensor-parallel ranks, which see
    different tokens here.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.is_expert:
            assert module.weight is not None, "experts have weights"
            module.weight.allreduce = False  # type: ignore[attr-defined]
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            _mark_cut(module.weight, 0)
        elif isinstance(module, RowParallelLinear):
            _mark_cut(module.weight, 1)


def _mark_cut(weight: Tensor | None, dim: int) -> None:
    """Mark the cut once: newer Megatron marks weights that it does not draw, too, and twice is an error."""
    if weight is not None and not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _block_spec(
    config: MsaTransformerConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """List the specs of this pipeline stage's layers.

    Example: 6 layers on 2 stages; the second stage gets layers 4, 5 and 6.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, first + i + 1) for i in range(count)],
        layer_norm=layer_classes(config.model.implementation).norm,
    )


def _layer_spec(config: MsaTransformerConfig, layer_number: int) -> ModuleSpec:
    classes = layer_classes(config.model.implementation)
    linear: dict[str, Any] = {"linear_fc1": classes.column, "linear_fc2": classes.row}
    of_expert: dict[str, Any] = {"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear}
    if config.is_fused:
        linear["activation_func"] = of_expert["activation_func"] = FusedGate
    mlp = ModuleSpec(module=FeedForward, submodules=MLPSubmodules(**linear))
    if layer_number > config.model.num_dense_ffn_layers:
        shared = ModuleSpec(module=SharedExpertMLP, submodules=MLPSubmodules(**linear))
        experts = MoESubmodules(
            experts=ModuleSpec(module=GroupedExperts, submodules=MLPSubmodules(**of_expert)),
            shared_experts=shared,
            router=SigmoidRouter,  # type: ignore[arg-type]
        )
        mlp = ModuleSpec(module=ExpertLayer, submodules=experts)
    attention = ModuleSpec(
        module=_ATTENTION[attention_kind(config, layer_number)],
        submodules=AttentionSubmodules(linear_qkv=classes.column, linear_proj=classes.row),
    )
    return ModuleSpec(
        module=MsaTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=classes.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=classes.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )


def forward_arguments(tokens: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
    """Make the arguments GPTModel wants around ours: [T] int64 tensors as a batch of one, no mask."""
    return {
        "input_ids": tokens.unsqueeze(0),
        "position_ids": torch.zeros_like(tokens).unsqueeze(0),
        "attention_mask": None,
        "labels": None if labels is None else labels.unsqueeze(0),
    }
