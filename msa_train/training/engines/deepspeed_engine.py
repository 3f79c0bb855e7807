"""Train by DeepSpeed's ZeRO 0 to 3 with offload to host memory: engine=deepspeed, on any device.

DeepSpeed is given one data-parallel group of all ranks and never hears of context parallelism: ranks that
share a sequence hold the same weights, and their gradients add up like those of other sequences. Losses are
divided by the step's global counts already (`step_batch`), so what is wanted of it is a plain sum.

Bytes for each bf16 parameter, by arithmetic, on N ranks with accumulation in fp32 (experts: N replicas):

    zero_stage 1   2 + 4 + 12 / N          weight, gradient, fp32 weight and moments
    zero_stage 2   2 + (4 + 12) / N        besides buckets of reduce_bucket_size
    zero_stage 3   (2 + 4 + 12) / N        besides the weights of the layer at hand and those that are next

So m3 (428B, 13.1B of them no experts) with ep 64 on 256 ranks takes 2 x 19.6 GB + 16 bytes x (13.1B / 256 +
6.5B / 4) = 66 GB a rank with zero_stage 2. ZeRO-3 cannot spread experts, and is for dense models.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msa_train.config import Offload, RunConfig, one_line
from msa_train.config.deepspeed.to_json import deepspeed_json
from msa_train.config.lr_schedule import LearningRates
from msa_train.data import Pack
from msa_train.model.attention.index_branch import is_index_parameter
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.parallel.process_groups import Groups
from msa_train.runtime.atomic_files import write_json
from msa_train.training.engines.deepspeed import state as states
from msa_train.training.engines.deepspeed.built_in_parts import BuiltInParts
from msa_train.training.engines.deepspeed.gather import gather_whole_layers, register_output_weight
from msa_train.training.engines.deepspeed.gradients import ParamGroup, reduced_gradients
from msa_train.training.engines.deepspeed.nvme import (
    json_of_rank,
    own_folder,
    weights_keep_their_dtype,
)
from msa_train.training.engines.deepspeed.partitions import whole_shape
from msa_train.training.engines.deepspeed.start import (
    expert_group_name,
    import_deepspeed,
    mark_experts,
    quiet,
)
from msa_train.training.engines.deepspeed.swap_folder import SwapFolder
from msa_train.training.engines.deepspeed.swapped_states import SwappedStates
from msa_train.training.engines.engine import (
    Accept,
    StepResult,
    TrainEngine,
    reset_token_counts,
    update_expert_bias,
)
from msa_train.training.optim.tiled_adamw import TiledAdamW
from msa_train.training.step_batch import StepBatch

JSON_NAME = "deepspeed.json"


class DeepSpeedEngine(TrainEngine):
    """Train with context, expert and data parallelism by DeepSpeed."""

    name = "deepspeed"

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        super().__init__(config, groups)
        self.deepspeed = import_deepspeed(groups)
        self.json = deepspeed_json(config)
        self.chunks = self.build_chunks()
        model = self.model
        mark_experts(model, groups, config.model.num_experts)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.folder = own_folder(config.deepspeed)
        partitions_weights = config.deepspeed.zero_stage == 3
        if partitions_weights:
            gather_whole_layers(model)
        self.optimizer = self._build_optimizer(named)
        self.engine = self._initialize()
        self.files = None if self.folder is None else self._in_files(self.folder)
        if partitions_weights:
            register_output_weight(model)
        # groups without parameters are gone by now
        self.gradients = reduced_gradients(self.engine, self.optimizer.param_groups, groups)
        self.set_stage(self.stage)

    def partition(self) -> BuiltInParts | None:
        """See TrainEngine.partition."""
        settings = self.config.deepspeed
        # weights in files are not within reach of `fill`: they are there whole, once
        if settings.zero_stage < 3 or settings.offload_param is Offload.nvme:
            return None
        return BuiltInParts(self.deepspeed, self.json)

    def _initialize(self) -> Any:
        """Let DeepSpeed take model and optimizer.

        Raises:
            ValueError: it refuses what deepspeed.raw says.
        """
        try:
            with quiet(), weights_keep_their_dtype():
                own = json_of_rank(self.json, self.folder, self.model, self.groups.dp_cp.size())
                return self.deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=own)[0]
        except ValueError as error:
            raw = self.config.deepspeed.raw
            if not raw:
                raise
            raise ValueError(f"deepspeed.raw={raw}: DeepSpeed refuses it ({one_line(str(error))})") from None

    def _in_files(self, folder: SwapFolder) -> SwappedStates:
        """Take over what is in files now.

        Raises:
            ValueError: the disk is full.
        """
        files = SwappedStates(folder, self.engine.optimizer)
        try:
            files.reserve()
        except OSError as error:
            path = self.config.deepspeed.nvme_path
            raise ValueError(
                f"deepspeed.nvme_path={path}: {error}; use a larger disk, or more ranks on other machines"
            ) from None
        return files

    def _build_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> TiledAdamW:
        """Build AdamW, with groups by weight decay, learning rate and the ranks that share weights."""
        optim = self.config.optim
        return TiledAdamW(
            self._param_groups(named),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )

    def _param_groups(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[ParamGroup]:
        """Group matrices and vectors of the backbone, of the index branch and of experts that are spread."""
        optim = self.config.optim
        found: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in named:
            is_spread = not getattr(parameter, "allreduce", True)
            key = is_index_parameter(name), len(whole_shape(parameter)) > 1, is_spread
            found.setdefault(key, []).append(parameter)
        groups: list[ParamGroup] = []
        for (index, is_matrix, is_spread), parameters in found.items():
            decay = optim.index_weight_decay if index else optim.weight_decay
            # vectors are norms and biases, which as usual do not decay
            group: ParamGroup = {
                "params": parameters,
                "weight_decay": decay if is_matrix else 0.0,
                "index": index,
            }
            if is_spread:
                group |= {"moe": True, "name": expert_group_name(self.groups)}
            groups.append(group)
        return groups

    def write_json(self, run_dir: Path) -> None:
        """Leave what DeepSpeed was given in the run's folder; rank 0 calls it."""
        write_json(run_dir / JSON_NAME, self.json)

    def train_step(self, batch: StepBatch, rates: LearningRates, accept: Accept | None = None) -> StepResult:
        """See TrainEngine.train_step."""
        assert batch.packs, "checked before the start: every rank has packs"
        self._begin_reading()
        self.engine.train()
        self.gradients.begin()
        reset_token_counts(self.chunks)
        stats, comm = LayerStats(), self.groups.cp_comm()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for number, pack in enumerate(batch.packs):
            # what a boundary is changes from step to step, and DeepSpeed would count to a fixed number
            self.engine.set_gradient_accumulation_boundary(number == len(batch.packs) - 1)
            params = self.forward.prepare(
                pack,
                num_tokens=batch.num_tokens,
                comm=comm,
                stats=stats,
                recall_seed=batch.recall_seed_of(pack),
                with_kl_value=batch.with_kl_value,
            )
            losses = self.forward(self.engine, params)
            # divided by the labels of all ranks and packs, so that gradients only need to be added up
            self.engine.backward(losses.sum() / batch.num_labels, scale_wrt_gas=False)
            loss_sum += losses.detach().sum(dtype=torch.float64)
        self.gradients.zero_groups(self._is_frozen)
        result = StepResult(
            lm_loss_sum=float(loss_sum),
            grad_norm=self.gradients.norm(),
            stats=stats,
            counters=comm.whole.counters,
        )
        # judged before the update, which cannot be taken back: weights and moments are changed in place
        result.is_taken = accept is None or accept(result)
        if result.is_taken:
            self._update(rates, result.grad_norm)
        else:
            self.gradients.discard()
        return result

    def _update(self, rates: LearningRates, norm: float) -> None:
        """Clip, step and move the experts' bias; see TorchEngine._update."""
        clip = self.config.optim.clip_grad
        if clip > 0 and norm > clip:
            self.gradients.scale(clip / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = rates.index if group["index"] else rates.backbone
        self._begin_reading()
        self.gradients.step()
        if not self.backbone_is_frozen:
            update_expert_bias(self.chunks, self.config.model.router_bias_update_rate)

    def _is_frozen(self, group: ParamGroup) -> bool:
        return self.index_is_frozen if group["index"] else self.backbone_is_frozen

    @torch.no_grad()
    def evaluate(self, packs: Sequence[Pack]) -> float:
        """See TrainEngine.evaluate."""
        if self.files is None:
            return self.sum_losses(self.engine, packs)
        total = 0.0
        for pack in packs:
            self._begin_reading()
            total += self.sum_losses(self.engine, [pack])
        return total

    def _begin_reading(self) -> None:
        """Make room for what comes from files in the order of a pass or update from its begin."""
        if self.files is not None:
            self.files.release()
            self.files.drop_prefetched()

    def close(self) -> None:
        """See TrainEngine.close."""
        if self.folder is not None:
            self.folder.remove()

    @property
    def make_staging(self) -> Callable[[int], torch.Tensor] | None:
        """See TrainEngine.make_staging: in a file, where the optimizer's state is too large for the host."""
        folder = self.folder
        return None if folder is None else lambda num_bytes: folder.empty(num_bytes, torch.uint8)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """See TrainEngine.sharded_state."""
        return states.sharded_state(self, loading)

    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """See TrainEngine.load_state."""
        states.load_state(self, state, updates)

    def load_weights(self, state: dict[str, Any]) -> None:
        """See TrainEngine.load_weights."""
        states.load_weights(self, state)
