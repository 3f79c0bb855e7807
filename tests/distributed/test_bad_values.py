"""A NaN or infinity that arises anywhere, on one rank: the step is left out in any exchange."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import DivergedError
from msa_train.config import BadStep, EngineKind, KvExchange, Recompute, RunConfig
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.trainer import Trainer
from msa_train.training.worker import load_data
from tests.distributed.test_bad_steps import digest
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import Case, Layout, resume_config
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

BAD, VICTIM = 2, 1
SIZES = {"cp_size": 2, "ep_size": 2}
NAN, INF = float("nan"), float("inf")
# Modules by a part of their name, and which of their outputs is spoilt; of a router, what goes in
PLACES = {
    "embedding": ("embedding", 0),
    "attention": ("layers.1.self_attention.linear_qkv", 0),
    "index queries": ("layers.1.self_attention.index_branch", 0),
    "index keys": ("layers.1.self_attention.index_branch", 1),
    "router": ("layers.1.mlp.router", 0),
    "experts": ("layers.1.mlp.experts", 0),
    "gradient": ("layers.0.self_attention.linear_proj", 0),
}


@contextmanager
def spoilt(engine: TrainEngine, place: str, value: float) -> Iterator[None]:
    """One number of what a module returns, or of a gradient, is `value`."""
    part, number = PLACES[place]
    (module,) = [m for name, m in engine.model.named_modules() if name.endswith(part)]
    if place == "gradient":
        (weight,) = module.parameters()
        handle: Any = weight.register_hook(lambda grad: _with(grad, value))
    elif place == "router":
        handle = module.register_forward_pre_hook(lambda _, inputs: (_with(inputs[0], value), *inputs[1:]))
    elif place == "experts":
        # tiles and grouped products do not go through the module's forward
        compute = module.compute
        with patch.object(module, "compute", lambda *args: _with(compute(*args), value)):
            yield
        return
    else:
        handle = module.register_forward_hook(_spoiler(number, value))
    yield
    handle.remove()


def _spoiler(number: int, value: float) -> Callable[[nn.Module, Any, Any], Any]:
    def spoil(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _with(output, value)
        return tuple(_with(x, value) if i == number else x for i, x in enumerate(output))

    return spoil


def _with(x: Tensor, value: float) -> Tensor:
    spoil = torch.ones_like(x)
    # in the middle, so that it is not in padding
    spoil.view(-1)[x.numel() // 2] = value
    return x * spoil


def config_of(folder: str, engine: EngineKind, exchange: KvExchange) -> RunConfig:
    layout = Layout(engine=engine, world_size=2, sizes=SIZES)
    config = resume_config(layout, Path(folder), Case(layout=layout))
    config.run_dir = f"{folder}/{engine.value}-{exchange.value}"
    Path(config.run_dir).mkdir(exist_ok=True)
    config.model = replace(config.model, layer_attention="swa,msa", num_layers=2)
    config.parallel.kv_exchange = exchange
    config.train.steps, config.train.bad_step, config.train.max_skipped = BAD, BadStep.skip, 2
    config.watchdog.timeout_s = 0
    config.logging.attention_every = config.logging.selections_every = BAD
    if exchange is KvExchange.auto:
        config.train.recompute = Recompute.full
    return config


def ending(trainer: Trainer, value: float) -> str:
    """Of a run whose index keys are spoilt, where train.bad_step=end."""
    with spoilt(trainer.engine, "index keys", value), pytest.raises(DivergedError) as caught:
        trainer.run(BAD - 1)
    return str(caught.value)


def scenarios(rank: int, world_size: int, folder: str, kind: EngineKind) -> dict[str, str]:
    """By exchange and place: what was wrong with the step, as this rank found it."""
    if kind is EngineKind.megatron:
        cuda_shim.install()
    found: dict[str, str] = {}
    for number, exchange in enumerate(KvExchange):
        config = config_of(folder, kind, exchange)
        groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
        engine = (MegatronEngine if kind is EngineKind.megatron else TorchEngine)(config, groups)
        store = CheckpointStore(config.run_dir)
        trainer = Trainer(config, groups, engine, load_data(config), store, None)
        trainer.run(0)
        before = digest(engine)
        for place in PLACES:
            # each place with one of them in half of the exchanges
            value = (NAN, INF)[(number + list(PLACES).index(place)) % 2]
            with spoilt(engine, place, value if rank == VICTIM else 1.0):
                trainer.run(BAD - 1)
            assert digest(engine) == before, f"{exchange.value}, {place}, {value}"
            found[f"{exchange.value}, {place}"] = trainer.guard.complaint
            trainer.bad_steps.in_a_row = 0
        config.train.bad_step = BadStep.end
        found[f"{exchange.value}, end"] = ending(trainer, NAN if rank == VICTIM else 1.0)
        leave_groups()
    return found


def without_kl(rank: int, world_size: int, folder: str, cp_size: int) -> dict[str, str]:
    """As `scenarios`, where no KL loss looks at index queries and keys; they decide the selection alone."""
    found: dict[str, str] = {}
    for exchange in KvExchange:
        config = config_of(folder, EngineKind.torch, exchange)
        config.run_dir += f"-cp{cp_size}"
        config.parallel.cp_size, config.attention.kl_weight = cp_size, 0.0
        Path(config.run_dir).mkdir(exist_ok=True)
        groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
        trainer = Trainer(
            config,
            groups,
            TorchEngine(config, groups),
            load_data(config),
            CheckpointStore(config.run_dir),
            None,
        )
        trainer.run(0)
        before = digest(trainer.engine)
        for place, value in itertools.product(("index queries", "index keys"), (NAN, INF)):
            with spoilt(trainer.engine, place, value if rank == VICTIM else 1.0):
                trainer.run(BAD - 1)
            name = f"{exchange.value}, {place}, {value}"
            assert digest(trainer.engine) == before, f"{name}: trained on"
            found[name] = trainer.guard.complaint
            trainer.bad_steps.in_a_row = 0
        leave_groups()
    return found


@pytest.mark.parametrize("cp_size", [1, 2])
def test_nothing_is_trained_on_a_selection_by_bad_values(cp_size: int, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first, second = run_ranks(2, without_kl, str(tmp_path), cp_size)
    assert first == second, "all ranks judge alike"
    for name, complaint in first.items():
        assert "not finite" in complaint, name


@pytest.mark.parametrize("kind", [EngineKind.torch, EngineKind.megatron])
def test_the_step_is_left_out_wherever_it_arises(kind: EngineKind, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first, second = run_ranks(2, scenarios, str(tmp_path), kind)
    assert first == second, "all ranks judge alike"
    for name, complaint in first.items():
        assert "not finite" in complaint, name
    where = "layer 2, exchanging block requests (request): cp rank 1 has NaN or infinity in its index keys"
    for exchange in (KvExchange.selected, KvExchange.auto):
        assert f"not finite ({where})" in first[f"{exchange.value}, index keys"]
        assert f"not finite ({where})" in first[f"{exchange.value}, end"]
