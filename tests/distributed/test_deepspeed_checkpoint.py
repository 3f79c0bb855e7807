"""Checkpoints of engine=deepspeed are those of every other engine, stage of ZeRO and layout, to the bit.

Chains of layouts, each of which loads what the one before it saved, and saves again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.diff import diff_checkpoints, pieces
from msa_train.checkpoint.load import load_checkpoint, load_weights
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.files import ShardedReader
from msa_train.checkpoint.torch_dist.format_versions import STATE_PREFIX
from msa_train.config import EngineKind, Offload, ParallelConfig, Precision, RunConfig
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.worker import build_engine
from tests.helpers import cuda_shim, plain_aio
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.megatron_runs import train
from tests.helpers.model_runs import small_config
from tests.helpers.resume_runs import small_deepspeed
from tests.helpers.spawn import run_ranks

WEIGHTS = f"{STATE_PREFIX}.fp32_param."
UPDATES = 2
ON_HOST = {"offload_optimizer": Offload.cpu}
# sub-groups of some parameters each, as those of large models are
ALL_ON_HOST = {
    **ON_HOST,
    "offload_param": Offload.cpu,
    "raw": {"zero_optimization": {"sub_group_size": 3000}},
}
# a folder of the test takes the place of this one
IN_FILES = {
    "offload_optimizer": Offload.nvme,
    "offload_param": Offload.nvme,
    "nvme_path": "disk",
    "raw": {
        "zero_optimization": {"sub_group_size": 3000},
        "aio": {"block_size": plain_aio.LEAST_BYTES},
    },
}
STATE_IN_FILES = {**IN_FILES, "offload_param": Offload.none}
WEIGHTS_IN_FILES = {**IN_FILES, "offload_optimizer": Offload.none}


@dataclass(kw_only=True, frozen=True)
class Link:
    """An engine that loads what `source` saved, or trains where that is empty, and saves; zero: the stage."""

    name: str
    source: str = ""
    engine: EngineKind = EngineKind.deepspeed
    zero: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    precision: Precision = Precision.bf16
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights_only: bool = False


CP, EP, EP4 = {"cp_size": 2}, {"cp_size": 2, "ep_size": 2}, {"ep_size": 4}
TORCH, MEGATRON = EngineKind.torch, EngineKind.megatron
FOUR_RANKS = [
    Link(name="torch", engine=TORCH, sizes=EP),
    Link(name="z3", source="torch", zero=3, sizes=CP),
    Link(name="z1", source="z3", zero=1, sizes=EP),
    Link(name="megatron", source="z1", engine=MEGATRON, sizes=EP),
    Link(name="z2", source="megatron", zero=2, sizes=EP4),
    Link(name="z3-host", source="z2", zero=3, settings=ALL_ON_HOST),
    Link(name="z2-host", source="z3-host", zero=2, sizes=EP, settings=ON_HOST),
    Link(name="torch-again", source="z2-host", engine=TORCH, sizes=CP),
    # offload to NVMe
    Link(name="nvme", source="torch", zero=3, sizes=CP, settings=IN_FILES),
    Link(name="nvme-torch", source="nvme", engine=TORCH, sizes=EP),
    Link(name="from-nvme", zero=3, settings=IN_FILES),
    # trained by ZeRO itself
    Link(name="from-z2", zero=2, sizes=EP4),
    Link(name="from-z2-torch", source="from-z2", engine=TORCH, sizes=EP),
    Link(name="from-z3", zero=3, settings=ALL_ON_HOST),
    Link(name="from-z3-torch", source="from-z3", engine=TORCH, sizes=EP),
    # another precision
    Link(name="wide", source="torch", zero=3, sizes=CP, precision=Precision.fp32),
    Link(name="wide-z0", source="wide", zero=0, sizes=EP, precision=Precision.fp32),
    Link(name="narrow", source="from-z3", zero=1, sizes=EP),
    Link(name="narrow-z3", source="wide-z0", zero=3),
    # weights alone
    Link(name="weights-z3", source="torch", zero=3, weights_only=True),
    Link(name="weights-nvme", source="torch", zero=3, settings=IN_FILES, weights_only=True),
    Link(name="weights-z2", source="torch", zero=2, sizes=EP, weights_only=True),
]
TWO_RANKS = [
    Link(name="two-z3", source="torch", zero=3),
    Link(name="two-nvme-state", source="nvme", zero=3, settings=STATE_IN_FILES),
    Link(name="two-nvme-weights", source="two-nvme-state", zero=3, settings=WEIGHTS_IN_FILES),
    Link(name="two-z1", source="two-z3", zero=1, sizes=EP),
]
SAME_PRECISION = [
    link
    for link in [*FOUR_RANKS, *TWO_RANKS]
    if link.source and not link.weights_only and not link.name.startswith(("wide", "narrow-z3"))
]


def path_of(folder: Path, name: str) -> Path:
    return CheckpointStore(folder / name).path(1)


def build(link: Link, folder: Path) -> TrainEngine:
    config = small_config(precision=link.precision)
    config.run_dir, config.engine = str(folder / link.name), link.engine
    # Megatron's vocabulary and heads are divisible by two
    config.model.num_heads, config.model.num_kv_heads, config.model.vocab_size = 8, 4, 64
    config.optim = replace(config.optim, clip_grad=1.0)
    config.parallel = ParallelConfig(**link.sizes)
    config.deepspeed = small_deepspeed(link.zero, **link.settings)
    if config.deepspeed.nvme_path:
        config.deepspeed.nvme_path = str(folder)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    return build_engine(config, build_groups(config.parallel, device=torch.device("cpu")))


def chain(rank: int, world_size: int, links: list[Link], folder: Path) -> None:
    cuda_shim.install()
    plain_aio.install()
    for link in links:
        engine = build(link, folder)
        if link.weights_only:
            template = engine.sharded_state(loading=True)["model"]
            engine.load_weights(load_weights(path_of(folder, link.source), template)[0])
        elif link.source:
            state = load_checkpoint(path_of(folder, link.source), engine.sharded_state(loading=True))
            engine.load_state(state, UPDATES)
        else:
            train(engine, steps=UPDATES)
        save_checkpoint(
            CheckpointStore(folder / link.name),
            step=1,
            sharded_state=engine.sharded_state(loading=False),
            common={},
            meta={"consumed_samples": 1, "fingerprint": fingerprint(RunConfig()), "layout": {}},
        )
        if link.engine is EngineKind.deepspeed:
            check_model(engine, path_of(folder, link.name))
            assert link.weights_only or updates_of(engine) == {UPDATES}
        leave_groups()


def updates_of(engine: Any) -> set[float]:
    return {float(state["step"]) for state in engine.optimizer.state.values()}


def check_model(engine: Any, path: Path) -> None:
    """On each rank the model computes with what the stored fp32 weights round to; ZeRO-3 gathers it."""
    from deepspeed.runtime.zero import GatheredParameters

    reader, checked = ShardedReader(path), 0
    names = {name for name in reader.shapes() if name.startswith(WEIGHTS)}
    for name, parameter in engine.model.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
            # experts are stored under other names
            if WEIGHTS + name in names:
                want = whole(reader, WEIGHTS + name).to(parameter.dtype)
                assert torch.equal(parameter.detach().view(-1), want), name
                checked += 1
    assert checked > 20


def whole(reader: ShardedReader, key: str) -> torch.Tensor:
    return torch.cat(
        [reader.rows(key, first, count).view(-1) for first, count in pieces(reader.shapes()[key])]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run_ranks(4, chain, FOUR_RANKS, folder)
    run_ranks(2, chain, TWO_RANKS, folder)
    return folder


@pytest.mark.parametrize("link", SAME_PRECISION, ids=lambda link: link.name)
def test_every_bit_arrives(link: Link, folder: Path) -> None:
    found = diff_checkpoints(path_of(folder, link.source), path_of(folder, link.name))
    assert found.is_empty, found
    assert found.num_equal > 100


@pytest.mark.parametrize(
    ("source", "target"),
    [("torch", "wide"), ("wide", "wide-z0"), ("wide-z0", "narrow-z3")],
    ids=["wide", "wide-z0", "narrow-z3"],
)
def test_the_optimizers_weights_outlive_the_models_precision(source: str, target: str, folder: Path) -> None:
    found = diff_checkpoints(path_of(folder, source), path_of(folder, target))
    assert not found.missing
    assert not found.extra
    assert not [one.key for one in found.different if one.key.startswith(STATE_PREFIX)]
    reader = ShardedReader(path_of(folder, target))
    for key in reader.shapes():
        if key.startswith(WEIGHTS):
            model = whole(reader, key.removeprefix(WEIGHTS))
            assert torch.equal(model, whole(reader, key).to(model.dtype)), key


def test_steps_with_files_are_those_in_memory(folder: Path) -> None:
    found = diff_checkpoints(path_of(folder, "from-z3"), path_of(folder, "from-nvme"))
    assert found.is_empty, found


@pytest.mark.parametrize("name", ["weights-z3", "weights-nvme", "weights-z2"])
def test_weights_alone_begin_without_moments(name: str, folder: Path) -> None:
    trained, begun = (ShardedReader(path_of(folder, one)) for one in ("torch", name))
    for key in begun.shapes():
        numbers = whole(begun, key)
        if key.startswith(WEIGHTS):
            assert torch.equal(numbers, whole(trained, key.removeprefix(WEIGHTS)).float()), key
        elif key.startswith(STATE_PREFIX):
            assert not numbers.any(), key
        else:
            assert torch.equal(numbers, whole(trained, key)), key
