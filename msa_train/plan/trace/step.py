"""Trace one rank: build the engine, make a step and a save, and report what was alive at the peaks."""

import contextlib
import time
from typing import Any
from unittest.mock import patch

import numpy as np
from megatron.core.pipeline_parallel import schedules

from msa_train.checkpoint.save import CheckpointSaver
from msa_train.config import RunConfig, longest_seq_len
from msa_train.config.lr_schedule import LearningRates
from msa_train.config.pipeline import resolve_layout
from msa_train.data import Pack
from msa_train.parallel.process_groups import Groups
from msa_train.plan.trace import parts
from msa_train.plan.trace.answers import answered
from msa_train.plan.trace.assumptions import Assumptions, Place, rank_of
from msa_train.plan.trace.cuda_names import DEVICE
from msa_train.plan.trace.fake_device import FakeDevice
from msa_train.plan.trace.report import TraceReport, make_report
from msa_train.plan.trace.storage_tracker import Peak
from msa_train.plan.trace.world import joined
from msa_train.training.engines import engine as engines
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.step_batch import StepBatch
from msa_train.training.worker import build_engine


def trace_rank(
    config: RunConfig,
    *,
    world_size: int,
    place: Place | None = None,
    assumptions: Assumptions | None = None,
    with_save: bool = True,
    quick: bool = False,
) -> TraceReport:
    """Run the trainer's step of one rank, and the copy for a checkpoint, on tensors without memory.

    The engine, its optimizer, the pipeline's schedule, the exchange and the checkpoint's code are those of a
    run; `fake_device` says what is answered and `answers` what is assumed. The process should do nothing else
    (`request.trace_in_child`): names of torch are replaced meanwhile.

    Costs for a stage of M3 at 1M tokens on 256 ranks, 3 micro-batches in flight: 45 s of one CPU core and 0.9
    GiB, 5 s of them to import torch and Megatron, 0.1 s to make the process groups.

    Args:
        config: the whole run.
        world_size: ranks of the job.
        place: the traced rank; None: the last context-parallel rank of the first stage.
        assumptions: what follows from data; None: its defaults.
        with_save: also make the copy for a checkpoint.
        quick: leave the step after the first backward pass, and trace the update by itself. Nothing that
            comes later in a pipeline holds more than that pass, so the peak is the same in half the time.

    Raises:
        HostReadError: the host wants a number that nobody has stated.
        ValueError: documents that do not fill a pack.
    """
    place, assumptions = place or Place(), assumptions or Assumptions()
    begin = time.perf_counter()
    device = FakeDevice(parts.part_of)
    rank = rank_of(config, world_size, place)
    world = joined(config, world_size, rank, DEVICE, assumptions.ranks_per_machine)
    with world as groups, answered(assumptions, device, groups), device:
        joined_at = time.perf_counter()
        with patch.object(engines, "init_weights", lambda *_, **__: None):
            engine = build_engine(config, groups)
        batch = _batch(config, groups, assumptions)
        empty = StepBatch(packs=[], num_labels=1, num_tokens=1, num_packs=0)
        # an update makes the moments; from then on memory at rest is that of every later step
        engine.train_step(empty, _RATES)
        _label(device, engine)
        built_at = time.perf_counter()
        device.reset_peak()
        static = Peak(device.current, list(device.peak.entries))
        if quick:
            _until_first_backward(engine, batch)
            engine.train_step(empty, _RATES)
        else:
            engine.train_step(batch, _RATES)
        device.finish()
        step_peak, stepped_at = device.peak, time.perf_counter()
        device.reset_peak()
        if with_save:
            _save(config, engine)
            device.finish()
        report = make_report(
            device, static=static, step=step_peak, with_save=with_save,
            seconds={
                "groups": joined_at - begin,
                "engine": built_at - joined_at,
                "step": stepped_at - built_at,
                "save": time.perf_counter() - stepped_at,
            },
        )  # fmt: skip
    return report


_RATES = LearningRates(backbone=1e-4, index=1e-4)


class _EnoughError(Exception):
    """End a step whose peak is known."""


def _until_first_backward(engine: TrainEngine, batch: StepBatch) -> None:
    """Run a step up to the end of its first backward pass."""
    backward_step = schedules.backward_step

    def last(*args: Any, **kwargs: Any) -> None:
        backward_step(*args, **kwargs)
        raise _EnoughError

    with patch.object(schedules, "backward_step", last), contextlib.suppress(_EnoughError):
        engine.train_step(batch, _RATES)


def _batch(config: RunConfig, groups: Groups, assumptions: Assumptions) -> StepBatch:
    seq_len = longest_seq_len(config)
    lengths = assumptions.documents or (seq_len,)
    block = config.attention.block_size
    slots = [-(-length // block) * block for length in lengths]
    starts = np.cumsum([0, *slots]).astype(np.int32)
    if starts[-1] != seq_len:
        raise ValueError(f"documents={lengths}: their whole blocks must make up {seq_len} tokens")
    tokens = np.zeros(seq_len, dtype=np.int64)
    pack = Pack(
        tokens=tokens, labels=tokens, cu_seqlens=starts, doc_lengths=np.array(lengths, dtype=np.int32)
    )
    own = max(1, config.train.global_batch_size // groups.dp_size)
    count = assumptions.micro_batches or min(own, _in_flight(config, groups))
    num_tokens = count * groups.dp_size * sum(lengths)
    return StepBatch(
        packs=[pack] * count, num_labels=num_tokens, num_tokens=num_tokens, num_packs=count * groups.dp_size
    )


def _in_flight(config: RunConfig, groups: Groups) -> int:
    """Count the micro-batches that fill the pipeline from this stage on.

    Stage s of P holds P - s of them when its first backward pass begins, and never more. An interleaved
    pipeline takes multiples of P; two rounds fill it.
    """
    if groups.pp_size == 1:
        return 1
    is_interleaved = resolve_layout(config, groups.world_size).num_chunks > 1
    return 2 * groups.pp_size if is_interleaved else groups.pp_size - groups.pp_rank


def _label(device: FakeDevice, engine: TrainEngine) -> None:
    """Give weights, gradients and optimizer state their parts, whatever lines made them."""
    everything: Any = engine
    chunks = engine.chunks
    device.relabel([[*chunk.parameters(), *chunk.buffers()] for chunk in chunks], parts.WEIGHTS)
    if not hasattr(everything, "wrapped"):
        gradients = everything.gradients
        device.relabel([gradients.dense.flat, gradients.expert.flat], parts.GRADIENTS)
        device.relabel(
            [m for m in everything.masters if not _is_of(m, everything.parameters)], parts.OPTIMIZER
        )
        _label_optimizers(device, vars(everything.optimizer).values())
        return
    for chunk in everything.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            device.relabel(buffer.grad_data, parts.GRADIENTS)
            if buffer.param_data is not None:
                device.relabel(buffer.param_data, parts.WEIGHTS)
    _label_optimizers(device, [part.optimizer for part in everything._optimizer_parts()])


def _is_of(tensor: Any, others: Any) -> bool:
    return any(tensor is other for other in others)


def _label_optimizers(device: FakeDevice, optimizers: Any) -> None:
    """Label what torch's optimizers update, apart from the model's own weights, and their states."""
    for optimizer in optimizers:
        if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
            continue
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        device.relabel([one for one in updated if device.part(one) != parts.WEIGHTS], parts.OPTIMIZER)
        device.relabel(list(optimizer.state.values()), parts.OPTIMIZER)


def _save(config: RunConfig, engine: TrainEngine) -> None:
    saver = CheckpointSaver(None, config.checkpoint)  # type: ignore[arg-type]
    # a check by all ranks, which makes nothing
    saver._is_validated = True
    saver._copy(
        1,
        lambda: engine.sharded_state(loading=False),
        {"step": 1},
        {"consumed_samples": 0, "fingerprint": "", "layout": {}},
    )
