"""Train with gradient all-reduce and torch.optim, on any device: engine=torch.

Every rank holds all dense parameters and its own experts, each with gradient, fp32 weight and two moments: 18
bytes per bf16 parameter, fewer with optim.moments_dtype, optim.grads_dtype and optim.offload, and under 1 GiB
of temporaries in the update. That is for models of some billions and for fp64; m3 needs engine=megatron.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import nn

from msa_train.checkpoint.torch_dist.format_versions import STATE_NAMES, STATE_PREFIX
from msa_train.config import RunConfig, Stage
from msa_train.config.lr_schedule import LearningRates
from msa_train.data import Pack
from msa_train.model.attention.index_branch import is_index_parameter
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.layers.moe.experts import GroupedExperts
from msa_train.parallel.process_groups import Groups
from msa_train.training.engines.engine import (
    Accept,
    StepResult,
    TrainEngine,
    checkpoint_metadata,
    reset_token_counts,
    update_expert_bias,
)
from msa_train.training.optim.grad_buffers import GradBuffers
from msa_train.training.optim.muon_adamw import MuonAdamW
from msa_train.training.optim.tiled_adamw import drop_gradient, set_gradient
from msa_train.training.step_batch import StepBatch


class TorchEngine(TrainEngine):
    """Train with context, expert and data parallelism by plain PyTorch parts."""

    name = "torch"

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        super().__init__(config, groups)
        self.chunks = self.build_chunks()
        for module in self.model.modules():
            if isinstance(module, GroupedExperts):
                module.lay_together()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = GradBuffers(self.parameters, groups, config.optim.grads_dtype)
        # 16-bit parameters are updated through fp32 copies: bf16 has 8 bits, so steps of less than 1/512 of a
        # weight would be rounded away.
        self.masters = [
            nn.Parameter(p.detach().float()) if p.dtype == torch.bfloat16 else p for p in self.parameters
        ]
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = MuonAdamW(
            config.optim,
            list(zip(self.names, self.masters, strict=True)),
            head_dim=config.model.head_dim,
            copies=[m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p],
        )
        self.set_stage(self.stage)

    def set_stage(self, stage: Stage) -> None:
        """See TrainEngine.set_stage. What is frozen costs no gradient work here."""
        super().set_stage(stage)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            frozen = self.index_is_frozen if is_index_parameter(name) else self.backbone_is_frozen
            parameter.requires_grad_(not frozen)

    def train_step(self, batch: StepBatch, rates: LearningRates, accept: Accept | None = None) -> StepResult:
        """See TrainEngine.train_step."""
        self.model.train()
        self.gradients.zero()
        reset_token_counts(self.chunks)
        stats, comm = LayerStats(), self.groups.cp_comm()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for pack in batch.packs:
            params = self.forward.prepare(
                pack,
                num_tokens=batch.num_tokens,
                comm=comm,
                stats=stats,
                recall_seed=batch.recall_seed_of(pack),
                with_kl_value=batch.with_kl_value,
            )
            losses = self.forward(self.model, params)
            # divided by the labels of all ranks and packs, so that gradients only need to be added up
            (losses.sum() / batch.num_labels).backward()
            loss_sum += losses.detach().sum(dtype=torch.float64)
        self.gradients.reduce()
        grad_norm = self.gradients.norm()
        result = StepResult(
            lm_loss_sum=float(loss_sum),
            grad_norm=grad_norm,
            stats=stats,
            counters=comm.whole.counters,
        )
        # judged before the update, which cannot be taken back: weights and moments are changed in place
        result.is_taken = accept is None or accept(result)
        if result.is_taken:
            self._update(rates, grad_norm)
            if not self.backbone_is_frozen:
                update_expert_bias(self.chunks, self.config.model.router_bias_update_rate)
        return result

    def _update(self, rates: LearningRates, norm: float) -> None:
        """Clip and step.

        Example: clip_grad=1 and a norm of 4 scale the gradients by 1 / (4 + 1e-6) = 0.24999994.

        Args:
            rates: learning rates.
            norm: of the gradients, over all ranks.
        """
        clip, factor = self.config.optim.clip_grad, 1.0
        if clip > 0 and norm > clip:
            # torch and Megatron have the small term against a norm of zero, as they divide first. Here the
            # norm is above the limit; the term stays so that the engines agree.
            factor = clip / (norm + 1e-6)
        if factor != 1.0 and not self.gradients.is_bf16:
            self.gradients.scale(factor)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            set_gradient(master, self.gradients.view(parameter))
        self.optimizer.step(rates, gradient_factor=factor)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            drop_gradient(master)
            if master is not parameter:
                parameter.data.copy_(master.data)

    @torch.no_grad()
    def evaluate(self, packs: Sequence[Pack]) -> float:
        """See TrainEngine.evaluate."""
        return self.sum_losses(self.model, packs)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """See TrainEngine.sharded_state."""
        model_state = self.model.sharded_state_dict(metadata=checkpoint_metadata(self.groups))
        return {"model": model_state, "optimizer": self._sharded_optimizer(model_state, loading)}

    def _sharded_optimizer(self, model_state: dict[str, Any], loading: bool) -> dict[str, dict[str, Any]]:
        """Cut fp32 weights and moments as the model's own entries are cut, under the parameters' names."""
        by_data: dict[int, ShardedTensor | ShardedTensorFactory] = {
            id(entry.data): entry
            for entry in nested_values(model_state)
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        result: dict[str, dict[str, Any]] = {}
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            entry = by_data[id(parameter)]
            # both are read: weights that are the model's own must not be overwritten by its rounded ones
            beside = loading and master is parameter
            weights = torch.empty_like(master) if beside else master.detach()
            values = (weights, *self.optimizer.moments(master, loading=loading))
            result[str(index)] = {
                name: make_sharded_optimizer_tensor(entry, value, f"{STATE_PREFIX}.{name}")
                for name, value in zip(STATE_NAMES, values, strict=True)
            }
        return result

    @torch.no_grad()
    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """See TrainEngine.load_state."""
        self.model.load_state_dict(state["model"])
        for index, master in enumerate(self.masters):
            loaded = state["optimizer"][str(index)]
            # More exact than the model's own where the checkpoint is of a bf16 run and this is none.
            master.copy_(loaded["fp32_param"])
            self.optimizer.load_moments(master, loaded["exp_avg"], loaded["exp_avg_sq"], updates)

    @torch.no_grad()
    def load_weights(self, state: dict[str, Any]) -> None:
        """See TrainEngine.load_weights."""
        self.model.load_state_dict(state, strict=False)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.copy_(parameter)
