"""Turn what the ranks saw in a step into one row of metrics, by a single all-reduce of sums and one maximum.

Every rank lays out the same fp64 vector: sums of its tokens, by layer and head or expert where that matters,
and zeros for layers of other pipeline stages. After the sum all ranks divide by counts of the whole step. So
no value depends on how tokens are dealt to ranks, and no rank's empty share counts as a zero in a mean.

For m3 the vector has 7,736 numbers, 62 KB, of them 57 x 128 for experts, whatever the ranks and the sequence.
A step in which recall is measured at 1M tokens adds 57 x 4 x 59 numbers, 108 KB. Steps that are not written
gather nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.config import (
    AttentionKind,
    KlTarget,
    KvExchange,
    RunConfig,
    Stage,
    StageAttention,
)
from msa_train.config.recompute import replays_attention
from msa_train.data.origin import OriginCounter
from msa_train.model.gpt import MsaGptModel
from msa_train.model.layers.moe import SigmoidRouter
from msa_train.model.transformer_config import DTYPES
from msa_train.parallel.attention.selection_recall import RecallSums
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups
from msa_train.training.engines.engine import StepResult
from msa_train.training.metrics.registry import METRICS
from msa_train.training.metrics.selection_recall import attention_metrics
from msa_train.training.step_batch import StepBatch

_TRAFFIC = [metric for metric in METRICS if metric.purpose]


def kv_bytes_all_gather(
    config: RunConfig,
    num_packs: int,
    seq_len: int,
    attention: StageAttention = StageAttention.sparse,
) -> int:
    """Count K/V bytes that all ranks together would receive if every msa and swa layer gathered them once.

    A ring moves the same. With full recomputation the forward runs, and fetches, twice. In a dense stage msa
    layers exchange as full ones do, and do not count.

    Example: m3 on one pack of 1M tokens with cp 256 in bf16: a rank's keys and values take 4,096 x 2 x 4 x
    128 x 2 bytes = 8 MiB; 256 ranks receive 255 such shards in each of 57 layers, 31.2 TB.

    Args:
        config: the run.
        num_packs: of the step, all data-parallel ranks.
        seq_len: tokens of a pack.
        attention: of the stage.
    """
    # Ulysses ranks share the KV heads of one shard: together they receive what one rank without them would.
    model, cp_size = config.model, config.parallel.cp_size // config.parallel.cp_head_size
    kinds = {AttentionKind.swa}
    if attention is StageAttention.sparse:
        kinds.add(AttentionKind.msa)
    by_block = sum(kind in kinds for kind in model.attention_kinds())
    element = torch.empty((), dtype=DTYPES[config.train.precision]).element_size()
    shard = seq_len // cp_size * 2 * model.num_kv_heads * model.head_dim * element
    # what runs again in the backward pass exchanges again
    passes = 1 + replays_attention(config)
    return round(num_packs * by_block * cp_size * (cp_size - 1) * shard * passes)


class StepMetrics:
    """Collect the metrics of steps on every rank; all ranks get the same numbers."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.config, self.groups = config, groups
        kinds = config.model.attention_kinds()
        self.msa_layers = [i + 1 for i, kind in enumerate(kinds) if kind is AttentionKind.msa]
        self.block_layers = [i + 1 for i, kind in enumerate(kinds) if kind is not AttentionKind.full]
        self.origins = OriginCounter(list(config.data.mixture))
        self.moe_layers = list(range(config.model.num_dense_ffn_layers + 1, config.model.num_layers + 1))

    def gather(
        self, batch: StepBatch, result: StepResult, stage: Stage, *, counts_loss: bool
    ) -> dict[str, Any]:
        """Gather the metrics of one training step. All ranks call it.

        Args:
            batch: the step's packs and global counts.
            stage: of the step.
            result: what the engine returned on this rank.
            counts_loss: this rank's loss sum is to be added.

        Returns:
            Values by key of the registry, the same on all ranks.
        """
        model, stats, exposed = self.config.model, result.stats, result.counters.exposed.seconds()
        parts = {
            "loss": torch.tensor([result.lm_loss_sum if counts_loss else 0.0], dtype=torch.float64),
            "kl": _by_layer(stats.kl, self.msa_layers, ()),
            "selected": _by_layer(stats.selected, self.msa_layers, (model.num_kv_heads,)),
            "experts": _by_layer(stats.tokens_per_expert, self.moe_layers, (model.num_experts,)),
            "attention": _by_layer(stats.attention, self.msa_layers, self._probe_shape(batch, stage)),
            "exchange": _by_layer(stats.exchange, self.block_layers, (2,)),
            "origins": torch.tensor(
                self.origins.count([(pack.origin, pack.doc_lengths) for pack in batch.packs]),
                dtype=torch.float64,
            ),
            "traffic": _by_purpose(result.counters.traffic.received),
            "exposed": _by_purpose(exposed),
        }
        # one collective for all of them: many small ones would cost a round trip over all ranks each
        flat = torch.cat([part.flatten() for part in parts.values()]).to(self.groups.device)
        with watched("metrics"):
            dist.all_reduce(flat)
        sums = dict(zip(parts, flat.cpu().split([part.numel() for part in parts.values()]), strict=True))
        sums = {name: total.view(parts[name].shape) for name, total in sums.items()}
        values: dict[str, Any] = {
            # sum over all ranks / labels of all ranks; tensor-parallel copies are left out by counts_loss
            "lm_loss": float(sums["loss"]) / batch.num_labels,
            # of all places that the step's packs have
            "padding_share": 1 - batch.num_tokens / (batch.num_packs * stage.seq_len),
            "grad_norm": result.grad_norm,
        }
        values |= self.origins.shares(sums["origins"].tolist())
        values |= self._kl(batch, sums["kl"], stage)
        values |= self._selected(batch, sums["selected"], stage)
        if batch.recall_seed is not None:
            values |= attention_metrics(sums["attention"], self.msa_layers)
        values |= self._experts(sums["experts"])
        if self.groups.cp_size > 1:
            values |= self._traffic(sums["traffic"], batch, stage)
            values |= self._exposed(sums["exposed"])
            values |= self._choices(sums["exchange"])
        return values | self._memory()

    def _traffic(self, traffic: Tensor, batch: StepBatch, stage: Stage) -> dict[str, int]:
        """Name the bytes that all ranks received: [declared purposes], and what an all-gather would move."""
        values: dict[str, int] = {}
        for metric, num_bytes in zip(_TRAFFIC, map(int, traffic.tolist()), strict=True):
            # counted apart by `CpComm`, but part of the whole, which the registry declares before it
            if metric.part_of:
                values[metric.part_of] += num_bytes
            if num_bytes or not metric.part_of:
                values[metric.key] = num_bytes
        gathered = kv_bytes_all_gather(self.config, batch.num_packs, stage.seq_len, stage.attention)
        if gathered or stage.attention is StageAttention.sparse:
            values["kv_bytes_all_gather"] = gathered
        if self.config.parallel.kv_exchange not in (KvExchange.selected, KvExchange.auto):
            del values["request_bytes"]
        if self.config.parallel.cp_head_size == 1:
            del values["heads_bytes"], values["heads_grad_bytes"]
        return values

    def _exposed(self, seconds: Tensor) -> dict[str, Any]:
        """Compute the seconds that a rank waits for the exchange, mean over ranks, from [purposes] sums."""
        mean = (seconds / self.groups.world_size).tolist()
        by_purpose = {metric.purpose: value for metric, value in zip(_TRAFFIC, mean, strict=True) if value}
        return {"exposed_s": sum(mean), "exposed_s_by_purpose": by_purpose}

    def _choices(self, calls: Tensor) -> dict[str, Any]:
        """Compute the share of calls for which `auto` sent selected blocks.

        Args:
            calls: [layers, 2], those that did and all.
        """
        if self.config.parallel.kv_exchange is not KvExchange.auto or not calls[:, 1].any():
            return {}
        # a layer without a call, in another kind of stage, has share 0 and not 0 / 0
        share = calls[:, 0] / calls[:, 1].clamp(min=1)
        return {
            "auto_selected": float(calls[:, 0].sum() / calls[:, 1].sum()),
            "auto_selected_by_layer": _named(self.block_layers, share.tolist()),
        }

    def _probe_shape(self, batch: StepBatch, stage: Stage) -> tuple[int, int]:
        """Return KV heads and sums of a layer's sampled queries; nothing in a step without."""
        if batch.recall_seed is None:
            return 0, 0
        num_blocks = stage.seq_len // self.config.attention.block_size
        return self.config.model.num_kv_heads, RecallSums.width(num_blocks)

    def _kl(self, batch: StepBatch, kl: Tensor, stage: Stage) -> dict[str, Any]:
        """Divide the KL sums [layers] by real queries of the whole step and KV heads, as the loss is."""
        if not (self.msa_layers and batch.with_kl_value) or stage.kl is KlTarget.none:
            return {}
        per_layer = kl / (batch.num_tokens * self.config.model.num_kv_heads)
        return {
            "kl_loss": float(per_layer.sum()),
            "kl_loss_by_layer": _named(self.msa_layers, per_layer.tolist()),
        }

    def _selected(self, batch: StepBatch, selected: Tensor, stage: Stage) -> dict[str, Any]:
        """Compute f, where something is selected and something is remote.

        Of NB blocks in P shards each rank has NB - NB / P remote ones, so all P ranks together NB (P - 1).
        Example: 8 blocks on 2 ranks, 8 remote ones in all; one rank selects 2, the other 4: f = 0.75.

        Args:
            batch: counts of the step.
            selected: [layers, KV heads], remote blocks that ranks select, summed over ranks and packs.
            stage: of the step.
        """
        cp_size = self.groups.cp_size // self.config.parallel.cp_head_size
        if not self.msa_layers or stage.attention is not StageAttention.sparse or cp_size == 1:
            return {}
        num_blocks = stage.seq_len // self.config.attention.block_size
        f = selected / (num_blocks * (cp_size - 1) * batch.num_packs)
        return {
            "kv_selected_fraction": float(f.mean()),
            "kv_selected_fraction_by_layer": _named(self.msa_layers, f.tolist()),
        }

    def _experts(self, tokens: Tensor) -> dict[str, Any]:
        """Tell how evenly tokens are dealt: [layers, experts], real tokens of all ranks."""
        if not self.moe_layers:
            return {}
        return {
            "tokens_per_expert_min": float(tokens.min()),
            "tokens_per_expert_max": float(tokens.max()),
            "tokens_per_expert_mean": float(tokens.mean()),
            "tokens_per_expert_min_by_layer": _named(self.moe_layers, tokens.amin(1).tolist()),
            "tokens_per_expert_max_by_layer": _named(self.moe_layers, tokens.amax(1).tolist()),
        }

    def _memory(self) -> dict[str, float]:
        """Return the memory of the fullest rank: allocated on its GPU at most so far, or resident now."""
        device = self.groups.device
        if device.type == "cuda":
            used = torch.cuda.max_memory_allocated(device)
        else:
            used = psutil.Process().memory_info().rss
        # a maximum cannot ride in the sum above: an all-reduce of its own, of 8 bytes
        largest = torch.tensor(float(used), dtype=torch.float64, device=device)
        with watched("metrics"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return {"memory_gib": float(largest) / 2**30}


def router_bias_range(chunks: Sequence[MsaGptModel]) -> dict[str, float]:
    """Return the smallest and largest expert bias of the routers on this rank, in all parts of its model."""
    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, SigmoidRouter)]
    biases = [r.expert_bias for r in routers if r.expert_bias is not None]
    if not biases:
        return {}
    stacked = torch.stack(biases)
    return {"router_bias_min": float(stacked.min()), "router_bias_max": float(stacked.max())}


def _by_purpose(counts: Mapping[str, float]) -> Tensor:
    """Order numbers as the registry does: [declared purposes] fp64."""
    return torch.tensor([counts.get(metric.purpose, 0) for metric in _TRAFFIC], dtype=torch.float64)


def _by_layer(sums: dict[int, Tensor], layers: list[int], shape: tuple[int, ...]) -> Tensor:
    """Stack sums by layer: [len(layers), *shape] fp64; layers of other pipeline stages are zero."""
    zero = torch.zeros(shape, dtype=torch.float64)
    rows = [sums[layer].double().cpu() if layer in sums else zero for layer in layers]
    return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=torch.float64)


def _named(layers: list[int], values: list[Any]) -> dict[str, Any]:
    """Name values by layer: [3, 4], [0.1, 0.2] -> {"layer03": 0.1, "layer04": 0.2}."""
    return {f"layer{layer:02d}": value for layer, value in zip(layers, values, strict=True)}
