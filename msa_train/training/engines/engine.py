"""Define the interface of an engine: model, gradient reduction and optimizer.

One step of any engine:

    forward and backward of each pack    losses divided by the step's global counts, see `step_batch`
    sum gradients over ranks             a plain sum, since every rank has divided by the same counts
    global norm                          the same on all ranks
    accept(result)                       on all ranks alike; where it says no, nothing has changed yet
    clip, update, expert bias
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import nn

from msa_train.config import RunConfig, Stage
from msa_train.config.lr_schedule import LearningRates
from msa_train.config.pipeline import resolve_layout
from msa_train.data import Pack
from msa_train.model.gpt import MsaGptModel, build_model
from msa_train.model.init_weights import Partition, init_weights
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.layers.moe import SigmoidRouter
from msa_train.model.pack_forward import PackForward
from msa_train.model.transformer_config import MsaTransformerConfig, build_transformer_config
from msa_train.parallel.comm.traffic import CommCounters
from msa_train.parallel.process_groups import Groups
from msa_train.training.step_batch import StepBatch


@dataclass(slots=True)
class StepResult:
    """Hold the figures that a step leaves on one rank."""

    lm_loss_sum: float
    "of this rank's tokens, fp64; 0 where no loss is computed or another tensor-parallel rank counts it"
    grad_norm: float
    "global norm before clipping, the same on all ranks"
    stats: LayerStats
    "sums that layers left, of this rank's tokens"
    counters: CommCounters
    "bytes and seconds of this rank's exchanges, and where a value was not finite"
    is_taken: bool = True
    "false: the weights, the optimizer and the experts' bias are as before"


# Asked of what the step would leave, before the update: afterwards the weights before it are gone, as keeping
# a copy would cost 12 bytes per parameter. The same answer on all ranks, or their weights part.
Accept = Callable[[StepResult], bool]


class BuiltInParts(Partition, AbstractContextManager[Any], Protocol):
    """Cut weights over ranks as soon as a module has them, within the context."""


class TrainEngine(ABC):
    """Train one model on this rank, step by step."""

    name: str
    "for meta.json"
    chunks: list[MsaGptModel]
    "this rank's parts of the model, in the order of the layers, without wrappers; one, unless interleaved"

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.forward = PackForward(config, groups)
        self.layout = resolve_layout(config, groups.world_size)

    @property
    def model(self) -> MsaGptModel:
        """Return this rank's part of the model where there is one; with several, all go by `chunks`."""
        (model,) = self.chunks
        return model

    def build_chunks(self) -> list[MsaGptModel]:
        """Build this rank's parts of the model on its device, weights drawn by name and seed.

        So they are the same in every layout.
        """
        count = self.layout.num_chunks
        # Megatron counts layers by it
        parallel_state.set_virtual_pipeline_model_parallel_world_size(count if count > 1 else None)
        # one for all chunks, as what is switched in it, such as a frozen bias, holds for all
        megatron = build_transformer_config(self.config, self.layout)
        return [self._build_chunk(megatron, chunk if count > 1 else None) for chunk in range(count)]

    def _build_chunk(self, megatron: MsaTransformerConfig, vp_stage: int | None) -> MsaGptModel:
        groups, chunk, parts = self.groups, vp_stage or 0, self.partition()
        is_last_chunk = chunk == self.layout.num_chunks - 1
        with parts or nullcontext():
            # embedding and output belong to the first and last pipeline stage
            model = build_model(
                self.config,
                groups.collection,
                pre_process=groups.is_pipeline_first_stage and chunk == 0,
                post_process=groups.is_pipeline_last_stage and is_last_chunk,
                megatron=megatron,
                vp_stage=vp_stage,
            ).to(groups.device)
        init_weights(
            model,
            seed=self.config.train.seed,
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
            ep_rank=groups.ep_rank,
            partition=parts,
        )
        return model

    def partition(self) -> BuiltInParts | None:
        """Return what cuts weights while the model is built; None: each is whole on this rank."""
        return None

    def set_stage(self, stage: Stage) -> None:
        """Train as this stage says from the next step on.

        What the stage freezes gets zero gradients and learning rate 0: it does not move, its moments decay,
        and the optimizer's count of steps goes on, so that all engines agree when it is trained again.
        """
        self.forward.stage = stage

    @property
    def stage(self) -> Stage:
        """Return the stage that is being trained."""
        return self.forward.stage

    @property
    def backbone_is_frozen(self) -> bool:
        """Tell whether everything but the index branch is frozen, the experts' bias included."""
        return self.stage.lr_scale == 0

    @property
    def index_is_frozen(self) -> bool:
        """Tell whether the index branches are frozen."""
        # a rate of the stage's own takes the place of the run's
        factor = 1.0 if self.stage.index_lr else self.config.optim.index_lr_scale
        return self.stage.index_lr_scale * factor == 0

    @abstractmethod
    def train_step(self, batch: StepBatch, rates: LearningRates, accept: Accept | None = None) -> StepResult:
        """Run forward, backward, reduction, clipping and update for one global batch. All ranks call it.

        Args:
            batch: this rank's packs and the counts of all.
            rates: learning rates of the update.
            accept: asked before the update, on all ranks; where it says no there is none. None: always yes.
        """

    @abstractmethod
    def evaluate(self, packs: Sequence[Pack]) -> float:
        """Sum this rank's token losses without gradients, fp64, in nats; not divided by anything."""

    def sum_losses(self, model: MsaGptModel, packs: Sequence[Pack]) -> float:
        """Evaluate a model that is in one part, see `evaluate`; model: it, or what wraps it."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for pack in packs:
            params = self.forward.prepare(pack, num_tokens=1, comm=self.groups.cp_comm(), stats=LayerStats())
            total += self.forward(model, params).sum(dtype=torch.float64)
        return float(total)

    @abstractmethod
    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Return model and optimizer as Megatron sharded tensors; the same keys from every engine.

        Args:
            loading: tensors are to be read into, their content does not matter.
        """

    @property
    def make_staging(self) -> Callable[[int], torch.Tensor] | None:
        """Return what makes the memory that checkpoints are copied to, by its bytes; None: host memory."""
        return None

    @abstractmethod
    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """Take over what was loaded into `sharded_state(loading=True)`.

        Args:
            state: from any engine.
            updates: that the optimizer has made; fewer than steps where steps were left out.
        """

    @abstractmethod
    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over the model part of a state alone; what it lacks keeps its value. Before the first step."""

    def close(self) -> None:
        """Give back what would outlive the process: files beside the run. Nothing is trained any more."""
        return

    def counts_loss(self) -> bool:
        """Tell whether this rank's loss sum is to be added: last stage, first of its tensor-parallel group.

        Others have no loss, or the same one: tensor-parallel ranks share the tokens.
        """
        return self.groups.is_pipeline_last_stage and self.groups.tp_rank == 0


def modules_of(chunks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules of all parts of a rank's model."""
    return chain.from_iterable(chunk.modules() for chunk in chunks)


def checkpoint_metadata(groups: Groups) -> dict[str, Any]:
    """Return options of Megatron's sharded state dicts: per-layer keys, optimizer state as the model's.

    So a checkpoint does not depend on the ranks that a flat optimizer buffer was cut for.
    """
    return {
        "dp_cp_group": groups.dp_cp,
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


@torch.no_grad()
def reset_token_counts(chunks: Sequence[MsaGptModel]) -> None:
    """Forget tokens counted towards the expert bias."""
    for module in modules_of(chunks):
        # Megatron's name, in routers that balance the load by a bias
        counts = getattr(module, "local_tokens_per_expert", None)
        if counts is not None:
            counts.zero_()


@torch.no_grad()
def update_expert_bias(chunks: Sequence[MsaGptModel], rate: float) -> None:
    """Raise the bias of experts with fewer tokens than the mean of all ranks, and lower the others'.

    All ranks call it; one all-reduce for all layers.

    Args:
        chunks: of this rank's model.
        rate: by which a bias moves.
    """
    routers = [module for module in modules_of(chunks) if isinstance(module, SigmoidRouter)]
    counts = [r.local_tokens_per_expert for r in routers if r.local_tokens_per_expert is not None]
    biases = [r.expert_bias for r in routers if r.expert_bias is not None]
    if not biases:
        return
    # adds up the counts of all ranks
    updated = get_updated_expert_bias(torch.stack(counts), torch.stack(biases), rate)
    for bias, new in zip(biases, updated, strict=True):
        bias.copy_(new)
