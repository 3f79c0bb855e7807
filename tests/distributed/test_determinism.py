"""`train.deterministic`: what it sets, and that no step has an operator without a fixed order on GPUs."""

import os
import re
import subprocess
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msa_train.config import (
    AttentionKernel,
    Fusion,
    KvExchange,
    Recompute,
    RunConfig,
    StageAttention,
    StageConfig,
)
from msa_train.config.lr_schedule import LearningRates
from msa_train.model.transformer_config import build_transformer_config
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import small_config, step_packs
from tests.helpers.spawn import run_ranks

# as torch lists them: nondeterministic on CUDA, without another implementation
MAX_OF_BAG = 2
THROWS = "normally-nondeterministic operations will throw a"
# of aten, where the module's name is another
NAMES = {"nllloss": "nll_loss", "ctcloss": "_ctc_loss", "embeddingbag": "_embedding_bag"}


def without_fixed_order() -> set[str]:
    """Names of operators that torch's own list says to raise, lower case, without underscores at the end."""
    text = torch.use_deterministic_algorithms.__doc__
    assert text is not None
    listed = text[text.index(THROWS) : text.index("In addition, several operations")]
    names = re.findall(r":(?:class|func):`torch\.(?:\w+\.)*(\w+)`", listed)
    return {NAMES.get(name.lower(), name.lower().rstrip("_")) for name in names}


class Recorder(TorchDispatchMode):
    """Notes every operator of a step."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        base = name.removesuffix("_backward").removesuffix("_forward")
        is_whole = isinstance(args[0], torch.Tensor) and not args[0].is_floating_point() if args else False
        weights = kwargs.get("weights", args[1] if len(args) > 1 else None)
        # sums of whole numbers, and counts without weights, are exact in every order
        harmless = (base == "cumsum" and is_whole) or (base == "bincount" and weights is None)
        # of bags, only the gradient of the largest has no fixed order
        mode = kwargs.get("mode", args[4] if len(args) > 4 else 0)
        harmless |= base == "_embedding_bag" and mode != MAX_OF_BAG
        if not harmless:
            self.found.add(base)
        return func(*args, **kwargs)


def record_steps(rank: int, world_size: int, exchanges: list[str]) -> set[str]:
    """Operators of training steps under several settings, on two ranks."""

    found: set[str] = set()
    dense = StageConfig(attention=StageAttention.dense)
    for exchange in exchanges:
        for settings in (
            {"recompute": Recompute.full},
            {"recompute": Recompute.selective, "offload": True, "fusion": Fusion.compile},
            {"stage": dense},
        ):
            config = small_config(cp_size=2, ep_size=2, exchange=KvExchange(exchange), **settings)  # type: ignore[arg-type]
            assert config.attention.kernel is AttentionKernel.auto
            engine = TorchEngine(config, build_groups(config.parallel, device=torch.device("cpu")))
            batch = make_batch(step_packs()[0], engine.groups, recall_seed=1)
            with Recorder(found):
                engine.train_step(batch, LearningRates(backbone=1e-2, index=1e-2))
            leave_groups()
    return found


def test_no_step_has_an_operator_without_a_fixed_order() -> None:
    listed = without_fixed_order()
    assert {"cumsum", "histc", "bincount", "put", "nll_loss"} <= listed
    (found, _) = run_ranks(2, record_steps, ["selected", "all_gather", "ring"])
    # the step was seen, and those that torch has another implementation for
    assert {"mm", "index_add", "_softmax"} & found
    assert found & listed == set()


def test_what_it_sets() -> None:
    """In a process of its own; what the user has set stays."""
    code = """
import os, torch
from msa_train.runtime.determinism import choose_deterministic
choose_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert os.environ["NCCL_ALGO"] == "Ring"
"""
    environ = os.environ | {"NCCL_ALGO": "Ring", "PYTHONPATH": os.pathsep.join(sys.path)}
    environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=120)


def test_megatron_is_told() -> None:
    config = RunConfig()
    assert not build_transformer_config(config).deterministic_mode
    config.train.deterministic = True
    assert build_transformer_config(config).deterministic_mode
