"""Run the packs of a step through Megatron's pipeline schedules, one pack to a micro-batch.

With several model chunks per rank (an interleaved pipeline) every pack passes each rank once per chunk. What
was planned for a pack, its tensors on the device included, is shared by the chunks and dropped after the
last. Between two chunks [T, 1, H] travels to the next rank and back: at 16,384 tokens a rank and H = 6,144 in
bf16 192 MiB, pp_size * chunks - 1 times per pack.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from msa_train.data import Pack
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackParams
from msa_train.model.pack_forward import PackForward
from msa_train.parallel.comm.cp_groups import CpGroups
from msa_train.training.step_batch import StepBatch

_LossAndSum = tuple[Tensor, Tensor, dict[str, Tensor]]
_Numbered = tuple[int, Pack]


class PipelineSchedule:
    """Run packs through this rank's model chunks."""

    def __init__(self, forward: PackForward, chunks: Sequence[nn.Module], pp_size: int) -> None:
        """Take what is run.

        Args:
            forward: plans packs and runs a model on them.
            chunks: wrapped by Megatron's DDP, in the order of the layers.
            pp_size: pipeline ranks.
        """
        self.forward, self.chunks, self.pp_size = forward, list(chunks), pp_size

    def run(
        self,
        packs: Sequence[Pack],
        batch: StepBatch,
        comm: CpGroups,
        stats: LayerStats,
        *,
        forward_only: bool,
    ) -> float:
        """Run all packs; return this rank's loss sum in nats, 0 where no loss is computed.

        Interleaved, Megatron takes multiples of pp_size packs only: where fewer are evaluated, the last one
        is run again, and counts once.
        """
        if not packs:
            return 0.0
        is_interleaved = len(self.chunks) > 1
        surplus = -len(packs) % self.pp_size if is_interleaved else 0
        assert forward_only or not surplus, "checked before the start: gradients would count twice"
        numbered = list(enumerate([*packs, *repeat(packs[-1], surplus)]))
        shared = _SharedParams(len(self.chunks), lambda pack: self._prepare(pack, batch, comm, stats))

        def forward_step(
            left: Iterator[_Numbered], model: nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], _LossAndSum]]:
            output = self.forward(model, shared.take(next(left)))  # type: ignore[arg-type]
            return output, lambda losses: _loss(losses, batch.num_labels)

        iterators = [iter(numbered) for _ in self.chunks]
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if is_interleaved else iterators[0],
            model=self.chunks,
            num_microbatches=len(numbered),
            # Sequence length of the activations between stages; Megatron divides by cp and tp sizes.
            seq_length=len(packs[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return float(sum(float(entry["loss_sum"]) for entry in islice(reduced, len(packs))))

    def _prepare(self, pack: Pack, batch: StepBatch, comm: CpGroups, stats: LayerStats) -> PackParams:
        return self.forward.prepare(
            pack,
            num_tokens=batch.num_tokens,
            comm=comm,
            stats=stats,
            recall_seed=batch.recall_seed_of(pack),
            with_kl_value=batch.with_kl_value,
        )


class _SharedParams:
    """Plan a pack when its first chunk runs, and forget the plan when its last chunk has it."""

    def __init__(self, uses: int, prepare: Callable[[Pack], PackParams]) -> None:
        self.uses, self.prepare = uses, prepare
        self.kept: dict[int, tuple[PackParams, int]] = {}

    def take(self, numbered: _Numbered) -> PackParams:
        """Return what was planned for a pack."""
        number, pack = numbered
        params, left = self.kept.pop(number, None) or (self.prepare(pack), self.uses)
        if left > 1:
            self.kept[number] = (params, left - 1)
        return params


def _loss(losses: Tensor, num_labels: int) -> _LossAndSum:
    """Return what Megatron's schedule asks of a loss function with per-token losses.

    The loss is divided by the global number of labels here; the token count of 1 is not used, since the
    engine leaves it out where gradients are finalized.

    Args:
        losses: [T], nats, of this rank's tokens; 0 where there is no label.
        num_labels: of the step, all ranks.

    Returns:
        The loss to differentiate, the number of tokens, and this rank's sum in fp64 for the metrics.
    """
    total = losses.detach().sum(dtype=torch.float64)
    one = torch.ones((), dtype=torch.int, device=losses.device)
    return losses.sum() / num_labels, one, {"loss_sum": total}
