"""Translate our configuration into Megatron's TransformerConfig. Its spellings stay behind this seam."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from msa_train.config import (
    Activation,
    AttentionConfig,
    AttentionKind,
    ExchangeConfig,
    Fusion,
    KvExchange,
    ModelConfig,
    MoeDispatcher,
    Precision,
    Recompute,
    RunConfig,
)
from msa_train.config.pipeline import PipelineLayout
from msa_train.config.recompute import recompute_modules, stage_recomputes

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp64: torch.float64,
}


@dataclass
class MsaTransformerConfig(TransformerConfig):
    """Hold Megatron's configuration with ours beside it, so that our modules read our own names."""

    model: ModelConfig = field(default_factory=ModelConfig)
    "shape of the model"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    "blocks, top-k, index branch, window"
    kv_exchange: KvExchange = KvExchange.selected
    "way of the exchange"
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    "details of the exchange"
    stage_recomputes: tuple[Recompute, ...] = (Recompute.none,)
    "what is recomputed in the backward pass, by pipeline rank"
    recomputed_modules: frozenset[str] = frozenset()
    "parts of layers that are, where that is selective"
    is_fused: bool = False
    "norms, rotary embedding, gates, router and the loss's softmax are compiled"
    offload_activations: bool = False
    "what layers keep waits in host memory"
    moe_dispatcher: MoeDispatcher = MoeDispatcher.alltoall
    "how rows travel between the ranks that share the experts"
    tile_tokens: int = 0
    "tokens of a tile of experts and feed-forward layers; 0: no tiles"


def build_transformer_config(config: RunConfig, layout: PipelineLayout | None = None) -> MsaTransformerConfig:
    """Make the Megatron configuration of a run; the same on every rank and device.

    Args:
        config: of the run.
        layout: layers of each pipeline stage; None: equal numbers, one chunk per rank.
    """
    model, parallel = config.model, config.parallel
    oai = model.activation is Activation.swiglu_oai
    dtype = DTYPES[config.train.precision]
    built = MsaTransformerConfig(
        model=model,
        attention=config.attention,
        kv_exchange=parallel.kv_exchange,
        exchange=config.exchange,
        stage_recomputes=stage_recomputes(config),
        recomputed_modules=recompute_modules(config),
        is_fused=fuses(config.train.fusion),
        offload_activations=config.train.offload_activations,
        moe_dispatcher=parallel.moe_dispatcher,
        tile_tokens=config.train.tile_tokens,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=_quick_gelu if oai else F.silu,
        activation_func_clamp_value=7.0 if oai else None,
        glu_linear_offset=1.0 if oai else 0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.train.precision is Precision.bf16,
        # Megatron's embedding then has a gradient without atomic sums
        deterministic_mode=config.train.deterministic,
        tensor_model_parallel_size=parallel.tp_size,
        # Megatron's MoE needs sequence parallelism with tensor parallelism.
        sequence_parallel=parallel.tp_size > 1,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=1,
        # Engines divide each pack's loss by the labels of the whole step, so Megatron must not divide again.
        calculate_per_token_loss=True,
        # Weights are drawn by name afterwards (model.init_weights).
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Each of these needs a GPU or Transformer Engine; the plain paths run everywhere.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        # Freed too early on gloo; costs one activation per stage.
        deallocate_pipeline_outputs=False,
        **_pipeline_fields(layout),
        **_graph_fields(),
        **_moe_fields(model, config.train.precision),
    )
    # The name is of one such function; set afterwards, as Megatron would ask for an activation of its list.
    built.use_te_activation_func = built.is_fused
    return built


def _pipeline_fields(layout: PipelineLayout | None) -> dict[str, Any]:
    """Cut the layers as the layout says; Megatron has names for what stands in each chunk, in order.

    Interleaved, a rank sends activations and gradients to the same neighbour, and with two stages both
    neighbours are one rank: messages of one batch would pair up by order, and wrongly. So they go one by one,
    as Megatron's own scripts have it, and the ranks compute meanwhile.
    """
    if layout is None or layout.is_even:
        return {}
    chunks = [["decoder"] * size for size in layout.sizes]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    is_interleaved = layout.num_chunks > 1
    return {
        "pipeline_model_parallel_layout": chunks,
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
    }


def fuses(fusion: Fusion) -> bool:
    """Tell whether functions are compiled: where it is asked for, and by default on GPUs."""
    return fusion is Fusion.compile or (fusion is Fusion.auto and torch.cuda.is_available())


def _quick_gelu(x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.702 x), any shape and float dtype.

    Megatron's own is compiled, for every number of tokens an expert gets anew; a recomputed layer then may
    meet another compiled version and save other tensors than its forward did.
    """
    return x * torch.sigmoid(1.702 * x)


def _graph_fields() -> dict[str, Any]:
    """Empty `cuda_graph_modules` where it exists: Megatron warns about its own default."""
    known = {f.name for f in fields(TransformerConfig)}
    return {"cuda_graph_modules": []} if "cuda_graph_modules" in known else {}


def _moe_fields(model: ModelConfig, precision: Precision) -> dict[str, Any]:
    num_moe_layers = model.num_layers - model.num_dense_ffn_layers
    if num_moe_layers == 0:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [0] * model.num_dense_ffn_layers + [1] * num_moe_layers,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.shared_expert_hidden_size or None,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        "moe_router_load_balancing_type": "none",
        # Routing in bf16 changes which experts are chosen.
        "moe_router_dtype": "fp64" if precision is Precision.fp64 else "fp32",
        "moe_token_dispatcher_type": "allgather",
    }


def attention_kind(config: MsaTransformerConfig, layer_number: int) -> AttentionKind:
    """Look up the attention of a layer; layer_number counts from 1, as Megatron does."""
    return config.model.attention_kinds()[layer_number - 1]
