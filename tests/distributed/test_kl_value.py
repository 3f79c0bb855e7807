"""The KL loss's value is formed in steps that are logged, and a run goes the same way to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import EngineKind, StageAttention, StageConfig
from msa_train.parallel.process_groups import build_groups
from msa_train.training.step_batch import StepBatch
from msa_train.training.trainer import Trainer
from msa_train.training.worker import build_engine, load_data
from tests.distributed.test_bad_steps import LAYOUTS as JUDGED
from tests.distributed.test_bad_steps import digest
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import BATCH, SEQ_LEN, Case, Layout, resume_config
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

STEPS, EVERY = 6, 3
LAYOUTS = {name: JUDGED[name] for name in ("torch-cp2-ep2", "deepspeed-z1")} | {
    "megatron-cp2-ep2": Layout(engine=EngineKind.megatron, world_size=2, sizes={"cp_size": 2, "ep_size": 2}),
}


def run(folder: str, layout: Layout, every: int) -> dict[str, Any]:
    """Half the steps dense, half sparse: by step the layers' values, gradients' norms, and the state left."""
    config = resume_config(layout, Path(folder), Case(layout=layout))
    config.run_dir += str(every)
    config.train.steps, config.logging.every = STEPS, every
    config.stages = {
        "warm": StageConfig(tokens=STEPS // 2 * BATCH * SEQ_LEN, attention=StageAttention.dense),
        "sparse": StageConfig(),
    }
    Path(config.run_dir).mkdir(exist_ok=True)
    groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
    engine = build_engine(config, groups)
    trainer = Trainer(config, groups, engine, load_data(config), CheckpointStore(config.run_dir), None)
    kl: list[dict[int, float]] = []
    norms: list[float] = []
    train_step = engine.train_step

    def observe(batch: StepBatch, *arguments: Any) -> Any:
        result = train_step(batch, *arguments)
        kl.append({layer: float(value) for layer, value in result.stats.kl.items()})
        norms.append(result.grad_norm)
        return result

    engine.train_step = observe  # type: ignore[method-assign]
    trainer.run(0)
    found = {"kl": kl, "norms": norms, "state": digest(engine)}
    leave_groups()
    return found


def runs(rank: int, world_size: int, folder: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every step logged, and every third."""
    if LAYOUTS[name].engine is EngineKind.megatron:
        cuda_shim.install()
    return run(folder, LAYOUTS[name], 1), run(folder, LAYOUTS[name], EVERY)


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_logged_steps_form_it(name: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    for always, sometimes in run_ranks(2, runs, str(tmp_path), name):
        assert all(set(values) == {2} and values[2] > 0 for values in always["kl"])
        logged = [step % EVERY == 0 for step in range(1, STEPS + 1)]
        assert sometimes["kl"] == [
            values if shown else {} for values, shown in zip(always["kl"], logged, strict=True)
        ]
        assert sometimes["norms"] == always["norms"]
        assert sometimes["state"] == always["state"]
