"""Trainings of one small run in many layouts, in processes that stay: each case takes as many as it needs.

Every process goes through the same list of cases and takes part in those that name it, as a world of its own;
so cases on other processes run at the same time.
"""

import gc
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EngineKind,
    ExchangeConfig,
    LoggingConfig,
    LrSchedule,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from msa_train.data import BatchStream, Pack
from msa_train.parallel.process_groups import Groups, build_groups
from msa_train.training import stage_packs
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.resume import resume
from msa_train.training.trainer import Reporting, Trainer
from msa_train.training.worker import build_engine, load_data
from tests.helpers import cuda_shim, devices
from tests.helpers.group_cleanup import leave_groups

PROCESSES = 4
SEQ_LEN, BLOCK_SIZE, BATCH = 64, 4, 2
SAVED_STEP, MORE_STEPS = 2, 10
CASE_TIMEOUT = timedelta(seconds=120)


@dataclass(kw_only=True, frozen=True)
class Layout:
    """An engine with sizes; world_size: processes. zero_stage and deepspeed: for engine=deepspeed."""

    engine: EngineKind
    world_size: int
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    precision: Precision = Precision.fp32
    pp_layout: str = "even"
    num_layers: int = 2
    optim: Mapping[str, Any] = field(default_factory=dict[str, Any])
    zero_stage: int = -1
    deepspeed: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """E.g. megatron-cp2-tp2-dp1; of settings of the optimizer the values."""
        cut = 1
        for size in ("cp_size", "tp_size", "pp_size"):
            cut *= self.sizes.get(size, 1)
        sizes = {**self.sizes, "dp_size": self.world_size // cut}
        parts = [f"{key.removesuffix('_size')}{value}" for key, value in sizes.items() if value > 1]
        cut_by = [] if self.pp_layout == "even" else [f"layers{self.pp_layout}"]
        precision = [] if self.precision is Precision.fp32 else [self.precision.value]
        given = {**self.optim, **self.deepspeed}
        settings = [f"{key}={getattr(value, 'value', value)}" for key, value in given.items()]
        zero = [f"z{self.zero_stage}"] if self.zero_stage >= 0 else []
        return "-".join([self.engine.value, *zero, *parts, *cut_by, *precision, *settings])


@dataclass(kw_only=True, frozen=True)
class Case:
    """One training.

    source: name of the layout whose checkpoint it goes on from; empty: it begins, and saves. done: a run
    that begins does not end with the checkpoint.
    """

    layout: Layout
    source: str = ""
    done: bool = True

    @property
    def name(self) -> str:
        """Unique in a list of cases."""
        return f"{self.source}_to_{self.layout.name}" if self.source else self.layout.name


def small_deepspeed(zero_stage: int, **settings: Any) -> DeepSpeedConfig:
    """Buffers of the size of small models; only norms and biases stay whole with ZeRO-3."""
    sizes = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "prefetch_bucket_size": 1_000}
    return DeepSpeedConfig(zero_stage=zero_stage, param_persistence_threshold=50, **{**sizes, **settings})


def resume_config(layout: Layout, folder: Path, case: Case) -> RunConfig:
    """Two layers of few numbers on a small corpus; a quarter of the blocks is selected."""
    load = f"{folder}/{case.source}/checkpoints/step_{SAVED_STEP:08d}" if case.source else ""
    return RunConfig(
        name=case.name,
        run_dir=f"{folder}/{case.name}",
        engine=layout.engine,
        model=ModelConfig(
            num_layers=layout.num_layers,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            vocab_size=258,
            num_dense_ffn_layers=0,
            ffn_hidden_size=16,
            num_experts=4,
            moe_router_topk=2,
            moe_ffn_hidden_size=8,
            shared_expert_hidden_size=8,
            layer_attention="full,msa",
            rotary_dim=4,
            init_std=0.2,
            embedding_init_std=0.2,
        ),
        attention=AttentionConfig(block_size=BLOCK_SIZE, topk=4, index_head_dim=4),
        parallel=replace(ParallelConfig(), pp_layout=layout.pp_layout, **dict(layout.sizes)),
        exchange=ExchangeConfig(hot_share=0.0),
        data=DataConfig(
            corpus=f"{folder}/corpus",
            cache_dir=f"{folder}/cache",
            seq_len=SEQ_LEN,
            validation_fraction=0.0,
        ),
        deepspeed=small_deepspeed(max(layout.zero_stage, 0), **layout.deepspeed),
        optim=OptimConfig(lr=3e-3, warmup_steps=4, schedule=LrSchedule.constant, **layout.optim),
        train=TrainConfig(
            steps=SAVED_STEP + (MORE_STEPS if case.done else 0),
            global_batch_size=BATCH,
            precision=layout.precision,
            validate_every=0,
        ),
        checkpoint=CheckpointConfig(every=0, load=load),
        logging=LoggingConfig(attention_every=0, tensorboard=False),
    )


class Record:
    """Metrics by step, in place of files and terminal."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def write(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """See MetricsWriter."""
        self.rows.append({"step": step, **values})
        return []

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""
        self.notes.append(text)


class SeenStream(BatchStream):
    """Notes the contents of the packs that were trained on."""

    seen: list[list[int]]

    def packs(self, first: int, dp_rank: int, dp_size: int, global_batch_size: int) -> list[Pack]:
        """See BatchStream."""
        packs = super().packs(first, dp_rank, dp_size, global_batch_size)
        self.seen.append([pack_id(pack) for pack in packs])
        return packs


def pack_id(pack: Pack) -> int:
    """Of its tokens and documents."""
    return zlib.crc32(pack.tokens.tobytes(), zlib.crc32(pack.cu_seqlens.tobytes()))


def run_cases(
    rank: int, world_size: int, phases: Sequence[Sequence[tuple[Case, tuple[int, ...]]]], folder: str
) -> None:
    """Run the cases that name this process; torch.save rows and samples to FOLDER/NAME/result.

    Args:
        rank, world_size: of all processes.
        phases: cases with the processes that run them; a phase begins when the one before it has ended.
        folder: with a corpus.
    """
    engines = {case.layout.engine for phase in phases for case, _ in phase}
    if EngineKind.megatron in engines and devices.chosen() == "cpu":
        cuda_shim.install()
    # a rank that leaves while another one still connects to it ends that one
    dist.barrier()
    dist.destroy_process_group()
    for number, phase in enumerate(phases):
        for case, members in phase:
            if rank in members:
                with _world(Path(folder) / f"store_{case.name}", members.index(rank), len(members)):
                    _run_case(case, Path(folder))
        with _world(Path(folder) / f"store_phase_{number}", rank, world_size):
            dist.barrier()
    dist.init_process_group(
        devices.backend(), init_method=f"file://{folder}/store_end", rank=rank, world_size=world_size
    )


@contextmanager
def _world(store: Path, rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group(
        devices.backend(),
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=CASE_TIMEOUT,
    )
    yield
    dist.barrier()
    dist.destroy_process_group()
    # Groups live on in cycles of references, and their threads turn without a pause when the others are gone.
    gc.collect()


def _run_case(case: Case, folder: Path) -> None:
    config = resume_config(case.layout, folder, case)
    groups = build_groups(config.parallel, device=devices.rank_device(), exchange=config.exchange)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    if config.engine is EngineKind.deepspeed:
        _number_modules_anew()
    engine = build_engine(config, groups)
    data = load_data(config)
    SeenStream.seen = []
    stage_packs.BatchStream = SeenStream  # type: ignore[misc]
    record = Record()
    reporting: Any = Reporting(record, record) if groups.rank == 0 else None  # type: ignore[arg-type]
    first = resume(config, engine).step
    begin = time.process_time()
    trainer = Trainer(config, groups, engine, data, CheckpointStore(config.run_dir), reporting)
    trainer.run(first, lambda step: trainer.save(step) if not case.source and step == SAVED_STEP else None)
    samples = _samples(groups)
    if groups.rank == 0:
        wanted = [
            [pack_id(data.train[SEQ_LEN][step * BATCH + i]) for i in range(BATCH)]
            for step in range(first, config.train.steps)
        ]
        result = {
            "rows": record.rows,
            "samples": samples,
            "wanted": wanted,
            "cpu_seconds": time.process_time() - begin,
        }
        torch.save(result, Path(config.run_dir) / "result")
    if isinstance(engine, MegatronEngine):
        # a cycle through autograd, which garbage collection does not see
        for chunk in engine.wrapped:
            chunk.grad_accs.clear()
    leave_groups()


def _number_modules_anew() -> None:
    """ZeRO-3 compares numbers of modules and parameters, which count on where others had other cases."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    # a default value that is changed in place
    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__  # type: ignore[misc]
    count[0] = 0


def _samples(groups: Groups) -> list[list[int]]:
    """Packs by step, in the order of their numbers: data-parallel rank r has every dp_size-th."""
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, (groups.dp_rank, SeenStream.seen))
    by_dp_rank = dict(everyone)
    assert all(by_dp_rank[dp_rank] == seen for dp_rank, seen in everyone)
    steps = len(by_dp_rank[0])
    return [
        [
            pack
            for packs in zip(*(by_dp_rank[r][step] for r in range(groups.dp_size)), strict=True)
            for pack in packs
        ]
        for step in range(steps)
    ]
