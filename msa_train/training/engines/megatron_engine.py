"""Train by Megatron's DDP, distributed optimizer and pipeline schedules: engine=megatron. GPUs only.

Megatron would divide gradients itself: by ranks, by micro-batches or by tokens. All of that is turned off,
since the losses are divided by the step's global counts already (`step_batch`): calculate_per_token_loss
leaves out ranks and micro-batches, `schedule` says that there is one token, `_finalize` passes none on. What
is left is a sum, of dense gradients over data and context parallel ranks, of expert gradients over the
replicas of each expert.

The distributed optimizer keeps fp32 weights and moments, 12 bytes per parameter, cut over those ranks. For m3
on 256 ranks with ep 64, without tp and pp: 13.1B parameters that are no experts over 256 ranks, 0.6 GB each,
and 6.5B of experts over 4, 19 GB each. The fp32 gradients are not cut: 4 bytes for each of a rank's 19.6B
parameters are 78 GB, so on GPUs of 80 GB that layout needs tp, pp or more ep. optim.moments_dtype,
grads_dtype and offload make all three smaller: `msa_train.config.optimizer_bytes`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from msa_train.config import GradsDtype, Precision, RunConfig, Stage
from msa_train.config.lr_schedule import LearningRates
from msa_train.data import Pack
from msa_train.model.attention.index_branch import is_index_parameter
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.layers.moe import SigmoidRouter
from msa_train.parallel.process_groups import Groups
from msa_train.training.engines.engine import (
    Accept,
    StepResult,
    TrainEngine,
    checkpoint_metadata,
    modules_of,
    reset_token_counts,
)
from msa_train.training.engines.megatron_state import owned_boxes, take_over
from msa_train.training.engines.schedule import PipelineSchedule
from msa_train.training.optim.bf16_gradients import Bf16GradientsDdp
from msa_train.training.optim.megatron_update import MegatronUpdate
from msa_train.training.step_batch import StepBatch


class MegatronEngine(TrainEngine):
    """Train with tensor, pipeline, context, expert and data parallelism by Megatron."""

    name = "megatron"

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        super().__init__(config, groups)
        self.chunks = self.build_chunks()
        self.megatron = self.chunks[0].config
        self.wrapped = self._wrap()
        self.optimizer = self._build_optimizer()
        parts, optim = self._optimizer_parts(), config.optim
        self._update = (
            MegatronUpdate(self.optimizer, parts, optim) if MegatronUpdate.is_for(optim, parts) else None
        )
        self.schedule = PipelineSchedule(self.forward, self.wrapped, groups.pp_size)

    def _wrap(self) -> list[Any]:
        """Wrap the chunks: bf16 weights where asked for, gradients gathered and reduced in buffers."""
        in_bf16 = self.config.optim.grads_dtype is GradsDtype.bf16
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=not in_bf16,
            overlap_grad_reduce=self.config.parallel.overlap_grad_reduce,
            overlap_param_gather=self.config.parallel.overlap_param_gather,
            use_distributed_optimizer=True,
        )
        self.megatron.finalize_model_grads_func = _finalize
        ddp = Bf16GradientsDdp if in_bf16 else DistributedDataParallel
        wrapped: list[Any] = []
        for number, chunk in enumerate(self.chunks):
            module: nn.Module = chunk
            if self.config.train.precision is Precision.bf16:
                module = Float16Module(self.megatron, chunk)
            # later chunks are done before the first one, whose buckets are what is left to hide
            wrapped.append(ddp(self.megatron, options, module, disable_bucketing=number > 0))
        if options.overlap_grad_reduce:
            # Only the last micro-batch of a step may start the reduction.
            functions = [chunk.no_sync for chunk in wrapped]
            self.megatron.no_sync_func = functions if len(functions) > 1 else functions[0]  # type: ignore[assignment]
        return wrapped

    def _build_optimizer(self) -> Any:
        """Build Megatron's AdamW over the wrapped model, the index branch in groups of its own."""
        optim = self.config.optim
        options = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=self.config.train.precision is Precision.bf16,
            params_dtype=self.megatron.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.config.parallel.overlap_param_gather,
        )
        # A group of its own, by a mark that Megatron's checkpoints tell groups apart by.
        index_branch = ParamKey(name="*.index_branch.*")
        overrides = get_standard_config_overrides(options)
        overrides[index_branch] = ParamGroupOverride(is_decoupled_lr=True)  # type: ignore[typeddict-unknown-key]
        return get_megatron_optimizer(options, self.wrapped, config_overrides=overrides)

    def set_stage(self, stage: Stage) -> None:
        """See TrainEngine.set_stage. Parameters keep their gradient hooks: overlapped reductions need all."""
        super().set_stage(stage)
        rate = 0.0 if self.backbone_is_frozen else self.config.model.router_bias_update_rate
        self.megatron.moe_router_bias_update_rate = rate

    def train_step(self, batch: StepBatch, rates: LearningRates, accept: Accept | None = None) -> StepResult:
        """See TrainEngine.train_step."""
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reset_token_counts(self.chunks)
        stats, comm = LayerStats(), self.groups.cp_comm()
        # Megatron updates them at the end of the schedule, before the gradient norm is known, so a step that
        # is not taken must bring them back.
        biases = [(bias, bias.clone()) for bias in self._expert_biases()] if accept is not None else []
        losses = self.schedule.run(batch.packs, batch, comm, stats, forward_only=False)
        self._zero_frozen_gradients()
        self._set_rates(rates)
        result = StepResult(
            lm_loss_sum=losses,
            grad_norm=self._grad_norm(),
            stats=stats,
            counters=comm.whole.counters,
        )
        # judged before the update, which cannot be taken back: weights and moments are changed in place
        result.is_taken = accept is None or accept(result)
        if result.is_taken:
            if self._update is not None:
                self._update.step(result.grad_norm)
            else:
                self.optimizer.step()
        for bias, before in [] if result.is_taken else biases:
            bias.copy_(before)
        self._keep_bias_fp32()
        return result

    def _grad_norm(self) -> float:
        """Return the norm of the gradients, before clipping, after which the optimizer may step."""
        if self._update is not None:
            return self._update.prepare()
        # The step will prepare them again: it copies gradients to the fp32 weights, so twice does no harm.
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _expert_biases(self) -> list[Tensor]:
        """List the bias of each router on this rank: [experts] fp32."""
        routers = [module for module in modules_of(self.chunks) if isinstance(module, SigmoidRouter)]
        return [router.expert_bias for router in routers if router.expert_bias is not None]

    def _zero_frozen_gradients(self) -> None:
        """Forget gradients of what the stage freezes, after their reduction: they add nothing to the norm."""
        for name, parameter in chain.from_iterable(chunk.named_parameters() for chunk in self.chunks):
            frozen = self.index_is_frozen if is_index_parameter(name) else self.backbone_is_frozen
            if frozen and parameter.requires_grad:
                parameter.main_grad.zero_()  # type: ignore[attr-defined]

    def _set_rates(self, rates: LearningRates) -> None:
        """Set learning rate and weight decay of every group; wd_mult is 0 for vectors."""
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            index = group["is_decoupled_lr"]
            group["lr"] = rates.index if index else rates.backbone
            group["weight_decay"] = group["wd_mult"] * (
                optim.index_weight_decay if index else optim.weight_decay
            )

    @torch.no_grad()
    def evaluate(self, packs: Sequence[Pack]) -> float:
        """See TrainEngine.evaluate."""
        for chunk in self.wrapped:
            chunk.eval()
        batch = StepBatch(packs=packs, num_labels=1, num_tokens=1, num_packs=len(packs))
        return self.schedule.run(packs, batch, self.groups.cp_comm(), LayerStats(), forward_only=True)

    def _keep_bias_fp32(self) -> None:
        """Keep the experts' bias in fp32: bf16 would round an update of 0.001 to a bias near 1 away."""
        for module in modules_of(self.chunks):
            if isinstance(module, SigmoidRouter):
                module._maintain_float32_expert_bias()

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """See TrainEngine.sharded_state.

        Nothing is gathered: weights are the model's own, of the optimizer each rank lists what it owns.
        """
        if self.config.parallel.overlap_param_gather:
            # Updated parameters are still on their way to the ranks.
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)
        model_state = self._sharded_model()
        optimizer = {
            str(number): owned_boxes(part, model_state, loading=loading)
            for number, part in enumerate(self._optimizer_parts())
        }
        return {"model": model_state, "optimizer": optimizer}

    def _sharded_model(self) -> dict[str, Any]:
        """Return the model as Megatron sharded tensors, whose data are the parameters themselves."""
        metadata = checkpoint_metadata(self.groups)
        return self._by_chunk([chunk.sharded_state_dict(metadata=metadata) for chunk in self.chunks])

    @torch.no_grad()
    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """See TrainEngine.load_state."""
        self._load_chunks(state["model"], strict=True)
        model_state = self._sharded_model()
        for number, part in enumerate(self._optimizer_parts()):
            take_over(part, model_state, state["optimizer"][str(number)])
            _set_updates(part.optimizer, updates)

    def _by_chunk(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Join the states of chunks, whose own keys count layers from 0 in each; stored keys do not."""
        return states[0] if len(states) == 1 else {f"chunk{number}": one for number, one in enumerate(states)}

    def _load_chunks(self, state: dict[str, Any], *, strict: bool) -> None:
        """Take over what `_by_chunk` gave."""
        parts = [state] if len(self.chunks) == 1 else [state[name] for name in sorted(state)]
        for chunk, part in zip(self.chunks, parts, strict=True):
            chunk.load_state_dict(part, strict=strict)

    def _optimizer_parts(self) -> list[Any]:
        """List Megatron's optimizers of dense parameters and of experts that have any on this rank."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]

    def load_weights(self, state: dict[str, Any]) -> None:
        """See TrainEngine.load_weights."""
        self._load_chunks(state, strict=False)
        self.optimizer.reload_model_params()


def _set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the count of updates, by parameter in PyTorch's Adam, by group in Transformer Engine and Apex."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = updates
        return
    for moments in optimizer.state.values():
        moments["step"] = torch.tensor(float(updates))


def _finalize(model: list[nn.Module], _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients and update the expert bias, without dividing by tokens once more."""
    finalize_model_grads(model, None, **kwargs)
