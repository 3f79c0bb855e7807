"""Modules with extra states as Transformer Engine's: their checkpoints and torch's are the same."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.distributed.checkpoint.filesystem import FileSystemReader

from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.load import load_checkpoint, load_weights
from msa_train.checkpoint.store import CheckpointStore
from msa_train.model import gpt
from msa_train.model.implementation import LayerClasses
from msa_train.model.layers.norm import RMSNorm
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import small_config
from tests.helpers.spawn import run_ranks


class _ExtraState:
    """Keep what Transformer Engine keeps: a pickle in a tensor of bytes, or in a file, by its version."""

    def get_extra_state(self) -> Any:
        content = pickle.dumps({"recipe": None, "scale": [1.0]})
        if isinstance(self, RowParallelLinear):
            return io.BytesIO(content)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nobody's extra state is taken over")


class Column(_ExtraState, ColumnParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron's own fill in for a missing extra state
        self._load_state_dict_pre_hooks.clear()


class Row(_ExtraState, RowParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()


class Norm(_ExtraState, RMSNorm):
    pass


# initial weights know norms by the name that both have
Norm.__name__ = RMSNorm.__name__

OTHER = LayerClasses(Column, Row, Norm)


def build_engine(*, is_other: bool, seed: int) -> TorchEngine:
    own = gpt.layer_classes
    if is_other:
        gpt.layer_classes = lambda _implementation: OTHER
    try:
        config = small_config(ep_size=2)
        config.train.seed = seed
        return TorchEngine(config, build_groups(config.parallel, device=torch.device("cpu")))
    finally:
        gpt.layer_classes = own


def check_exchanged(rank: int, world_size: int, folder: Path) -> None:
    """Save by each implementation; load by the other one, whole and weights alone."""
    wanted, stored = {}, []
    for is_other in (False, True):
        engine = build_engine(is_other=is_other, seed=7)
        assert any(isinstance(module, Norm) for module in engine.model.modules()) is is_other
        store = CheckpointStore(folder / str(is_other))
        meta = {"consumed_samples": 0, "fingerprint": fingerprint(engine.config), "layout": {}}
        save_checkpoint(
            store, step=1, sharded_state=engine.sharded_state(loading=False), common={}, meta=meta
        )
        wanted = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        reader = FileSystemReader(store.path(1))
        stored.append(set(reader.read_metadata().state_dict_metadata))
        leave_groups()
    assert stored[0] == stored[1]
    assert len([key for key in stored[0] if "_extra_state" in key]) > 10
    for saved_by_other in (False, True):
        path = CheckpointStore(folder / str(saved_by_other)).path(1)
        for weights_only in (False, True):
            engine = build_engine(is_other=not saved_by_other, seed=8)
            template = engine.sharded_state(loading=True)
            if weights_only:
                engine.load_weights(load_weights(path, template["model"])[0])
            else:
                engine.load_state(load_checkpoint(path, template), 1)
            for name, parameter in engine.model.named_parameters():
                assert torch.equal(parameter, wanted[name]), (name, saved_by_other, weights_only)
            leave_groups()


def check_strict(rank: int, world_size: int) -> None:
    """Everything else is still missed, and still too much."""
    engine = build_engine(is_other=True, seed=7)
    state = dict(engine.model.state_dict())
    assert "decoder.layers.0.input_layernorm._extra_state" in state
    engine.model.load_state_dict(state)
    weight = state.pop("decoder.layers.0.input_layernorm.weight")
    with pytest.raises(RuntimeError, match=r"lacks \['decoder.layers.0.input_layernorm.weight'\]"):
        engine.model.load_state_dict(state)
    engine.model.load_state_dict(state, strict=False)
    state |= {"decoder.layers.0.input_layernorm.weight": weight, "more": weight}
    with pytest.raises(RuntimeError, match=r"has \['more'\]"):
        engine.model.load_state_dict(state)
    leave_groups()


def check(rank: int, world_size: int, folder: Path) -> None:
    check_exchanged(rank, world_size, folder)
    check_strict(rank, world_size)


def test_implementations_exchange_checkpoints(tmp_path: Path) -> None:
    run_ranks(2, check, tmp_path)
