"""Training steps of a small fp32 model on engine=deepspeed and, on one process, on engine=torch."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from msa_train.config import (
    DeepSpeedConfig,
    KvExchange,
    Offload,
    Precision,
    Recompute,
    RunConfig,
    plan_stages,
)
from msa_train.config.lr_schedule import LearningRates, stage_rates
from msa_train.data import Pack
from msa_train.model.init_weights import global_names
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines import engine as engine_module
from msa_train.training.engines.deepspeed.partitions import opened, whole_shape
from msa_train.training.engines.deepspeed_engine import DeepSpeedEngine
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch
from tests.helpers import devices, plain_aio
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.megatron_runs import recipe_stages
from tests.helpers.model_runs import BLOCK_SIZE, SEQ_LEN, VOCAB, small_config, step_packs
from tests.helpers.packs import make_pack

STEPS = 5


@dataclass(frozen=True)
class Case:
    """One run; zero_stage None: engine=torch."""

    zero_stage: int | None
    packs: int
    "of every step"
    cp_size: int = 1
    ep_size: int = 1
    recompute: Recompute = Recompute.none
    exchange: KvExchange = KvExchange.selected
    precision: Precision = Precision.fp32
    tile_tokens: int = 0
    offload_activations: bool = False
    overlap: bool = False
    offload: Offload = Offload.none
    "of the optimizer, with ZeRO-3 of the weights too"
    offload_param: Offload | None = None
    "of the weights, if not as the optimizer's"
    nvme_path: str = ""
    raw: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)
    "of zero_optimization"
    recipe: bool = False
    "a stage for each step, see recipe_stages"


def case_config(case: Case) -> RunConfig:
    """The configuration of a case."""
    config = small_config(
        cp_size=case.cp_size,
        ep_size=case.ep_size,
        exchange=case.exchange,
        recompute=case.recompute,
        precision=case.precision,
        tile_tokens=case.tile_tokens,
        offload=case.offload_activations,
    )
    # A large eps: without it an element whose gradient is rounding alone would move as far as any other.
    config.optim = replace(config.optim, clip_grad=1.0, eps=1e-2, index_lr_scale=3.0)
    config.optim.weight_decay, config.optim.index_weight_decay = 0.5, 2.0
    config.train.global_batch_size = case.packs
    if case.recipe:
        config.stages = recipe_stages()
        config.train.steps = 0
    if case.zero_stage is not None:
        config.deepspeed = DeepSpeedConfig(
            zero_stage=case.zero_stage,
            offload_optimizer=case.offload,
            offload_param=_offload_param(case),
            nvme_path=case.nvme_path,
            raw=_raw(case),
            overlap_comm=case.overlap,
            # So small that there are several buckets, and that ZeRO-3 gathers every weight.
            reduce_bucket_size=12000,
            allgather_bucket_size=12000,
            prefetch_bucket_size=20000,
            param_persistence_threshold=0,
        )
    return config


def _offload_param(case: Case) -> Offload:
    if case.offload_param is not None:
        return case.offload_param
    return case.offload if case.zero_stage == 3 else Offload.none


def _raw(case: Case) -> dict[str, Any]:
    raw: dict[str, Any] = {"zero_optimization": dict(case.raw)} if case.raw else {}
    if case.nvme_path:
        raw["aio"] = {"block_size": plain_aio.LEAST_BYTES}
    return raw


def build(case: Case) -> TrainEngine:
    """The engine of a case over the whole world."""
    config = case_config(case)
    groups = build_groups(config.parallel, device=devices.rank_device(), exchange=config.exchange)
    return (TorchEngine if case.zero_stage is None else DeepSpeedEngine)(config, groups)


def destroy(engine: TrainEngine) -> None:
    """Make room for another engine in this process."""
    if isinstance(engine, DeepSpeedEngine):
        engine.engine.destroy()
        engine.close()
    leave_groups()


def packs_of(step: int, count: int) -> list[Pack]:
    """Packs of one step: long documents, many short ones."""
    made = step_packs()[step % 2]
    while len(made) < count:
        seed = 100 * step + len(made)
        lengths = [7 + seed % 5, 30, 1, 20, 15]
        made.append(make_pack(lengths, seq_len=SEQ_LEN, block_size=BLOCK_SIZE, vocab_size=VOCAB, seed=seed))
    return made[:count]


def take_step(engine: TrainEngine, step: int, count: int, *, accept: bool = True) -> dict[str, Any]:
    """One step; its global loss, gradient norm and KL loss sum of this rank."""
    groups = engine.groups
    packs = packs_of(step, count)[groups.dp_rank :: groups.dp_size]
    batch = make_batch(packs, groups)
    rate = 2e-3 / (step + 1)
    rates = LearningRates(backbone=rate, index=3 * rate)
    if engine.config.stages:
        plan = plan_stages(engine.config)
        engine.set_stage(plan[step])
        rates = stage_rates(step, engine.config.optim, plan[step], len(plan))
    result = engine.train_step(batch, rates, lambda _: accept)
    assert result.is_taken is accept
    total = torch.tensor(result.lm_loss_sum, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return {"loss": float(total) / batch.num_labels, "norm": result.grad_norm}


def whole_weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """This rank's weights and expert biases by global name, whole."""
    names = list(global_names(engine.model, ep_rank=engine.groups.ep_rank))
    with _gathered([p for _, p in names]):
        found = {name: p.detach().clone() for name, p in names}
    return found | {name: b.clone() for name, b in engine.model.named_buffers() if "expert_bias" in name}


def _gathered(parameters: list[Any]) -> Any:
    cut = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)


def snapshot(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Copies of weights, moments, counts of updates and biases of this rank."""
    kept = list(whole_weights(engine).values())
    for part in opened(engine.engine.optimizer, engine.files):
        kept += [value.clone() for value in part.state.values()]
    # counts stand beside the moments
    kept += [s["step"].clone() for s in engine.optimizer.state.values() if "step" in s]
    return kept


def run_case(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """Steps of a case: figures of each, validation loss, and this rank's weights afterwards."""
    engine = build(case)
    rows = [take_step(engine, step, case.packs) for step in range(4 if case.recipe else steps)]
    value = torch.tensor(engine.evaluate(packs_of(1, 1)), dtype=torch.float64)
    torch.distributed.all_reduce(value, group=engine.groups.cp)
    weights = whole_weights(engine)
    destroy(engine)
    return {"steps": rows, "val": float(value), "weights": weights}


def run_cases(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """All cases one after the other, on one rank."""
    return [run_case(case) for case in cases]


def elements_when_built(rank: int, world_size: int, stages: Sequence[int]) -> list[tuple[int, int]]:
    """For each stage, elements of the weights of the whole model, and of those that lie on a rank whole.

    At the time when the model has been built and no weight has a value yet.
    """
    draw, found = engine_module.init_weights, []

    def count(model: Any, **arguments: Any) -> None:
        parameters = list(model.parameters())
        whole = sum(whole_shape(p).numel() for p in parameters)
        found.append((whole, sum(p.numel() for p in parameters)))
        draw(model, **arguments)

    engine_module.init_weights = count
    for stage in stages:
        destroy(build(Case(stage, 2, cp_size=world_size)))
    return found


def refuse_steps(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, bool]]:
    """Whether a refused step leaves everything to the bit, and the step after it, too."""
    found = []
    for case in cases:
        engine = build(case)
        assert isinstance(engine, DeepSpeedEngine)
        take_step(engine, 0, case.packs)
        before = snapshot(engine)
        take_step(engine, 1, case.packs, accept=False)
        after = snapshot(engine)
        last = take_step(engine, 2, case.packs), whole_weights(engine)
        destroy(engine)
        engine = build(case)
        take_step(engine, 0, case.packs)
        want = take_step(engine, 2, case.packs), whole_weights(engine)
        destroy(engine)
        found.append(
            {
                "kept": same(before, after),
                "followed": last[0] == want[0] and same(list(last[1].values()), list(want[1].values())),
                "moves": not same(before, list(want[1].values()) + before[len(want[1]) :]),
            }
        )
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """To the bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def worst_errors(got: Sequence[dict[str, Any]], want: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of losses, norms, validation and weights, over all ranks of a case.

    A weight's error is relative to the largest element of what its tensor stands for.
    """
    errors = {"loss": 0.0, "norm": 0.0, "val": 0.0, "weights": 0.0}
    for of_rank in got:
        assert len(of_rank["steps"]) == len(want["steps"])
        for ours, theirs in zip(of_rank["steps"], want["steps"], strict=True):
            for key in ("loss", "norm"):
                errors[key] = max(errors[key], abs(ours[key] / theirs[key] - 1))
        errors["val"] = max(errors["val"], abs(of_rank["val"] / want["val"] - 1))
        for name, value in of_rank["weights"].items():
            right = want["weights"][name]
            assert value.shape == right.shape, name
            # norms act as 1 + w here
            scale = 1.0 if "norm" in name else float(right.abs().max()) or 1.0
            errors["weights"] = max(errors["weights"], float((value - right).abs().max()) / scale)
    names = {name for of_rank in got for name in of_rank["weights"]}
    assert names == set(want["weights"]), "every weight is on some rank"
    return errors
