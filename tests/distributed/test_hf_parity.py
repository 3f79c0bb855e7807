"""The released models' own code and ours: the same logits and the same gradients, on one rank and on two."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.checkpoint.load import load_checkpoint
from msa_train.checkpoint.weights_only import checkpoint_folder, publish_weights, shape_of
from msa_train.config import (
    DataConfig,
    EngineKind,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from msa_train.config.lr_schedule import LearningRates
from msa_train.convert.config_read import HfModel, read_hf_config
from msa_train.convert.export_hf import plan_export, read_config_file, write_export
from msa_train.convert.import_hf import plan_import, write_import
from msa_train.data import IGNORE_LABEL, Pack
from msa_train.model.gpt import forward_arguments
from msa_train.model.init_weights import global_names
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.engine import checkpoint_metadata
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch
from tests.helpers import hf_models
from tests.helpers.compare import assert_rows_close
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.hf_models import GRADIENTS, MODEL, REFERENCE, SCENARIOS, Scenario
from tests.helpers.packs import make_pack
from tests.helpers.spawn import run_ranks

TOLERANCE = 2e-5
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per scenario: checkpoint of transformers, ours of the same weights, logits and gradients."""
    pytest.importorskip("transformers", minversion="5.23")
    folder = tmp_path_factory.mktemp("references")
    for scenario in SCENARIOS:
        hf_models.save_reference(scenario, folder / scenario.name)
        import_model(folder / scenario.name)
    return folder


def import_model(folder: Path) -> None:
    hf = read_hf_config(read_config_file(folder / MODEL))
    plan = plan_import(folder / MODEL, hf)
    publish_weights(
        folder / "ours",
        hf.model,
        hf.attention,
        lambda target: write_import(plan, target, lambda _: None),
        source="test",
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_and_gradients_are_those_of_transformers(references: Path, world_size: int) -> None:
    run_ranks(world_size, check_scenarios, references)


@pytest.mark.parametrize("name", ["m2", "m3_mixed", "m3_tied", "m3_yarn", "m2_linear"])
def test_transformers_loads_an_export(references: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoint_folder(references / name / "ours")
    plan = plan_export(checkpoint, *shape_of(checkpoint), shard_bytes=20_000)
    assert len(plan.files) > 1
    write_export(plan, tmp_path / "exported", lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    scenario = next(one for one in SCENARIOS if one.name == name)
    want = torch.load(references / name / REFERENCE)["logits"]
    for text, logits in zip(hf_models.documents(scenario), want, strict=True):
        assert torch.equal(model(input_ids=text[None]).logits[0], logits)


def check_scenarios(rank: int, world_size: int, references: Path) -> None:
    for scenario in SCENARIOS:
        try:
            check_scenario(scenario, references / scenario.name, world_size)
        except AssertionError as error:
            raise AssertionError(f"{scenario.name}: {error}") from error
        leave_groups()


def check_scenario(scenario: Scenario, folder: Path, world_size: int) -> None:
    hf = read_hf_config(read_config_file(folder / MODEL))
    engine = loaded_engine(scenario, hf, folder / "ours", world_size)
    pack = pack_of(scenario)
    want = torch.load(folder / REFERENCE)
    check_logits(engine, pack, scenario, want["logits"])
    result = engine.train_step(make_batch([pack], engine.groups), LearningRates(backbone=0.0, index=0.0))
    loss = torch.tensor(result.lm_loss_sum, dtype=torch.float64)
    dist.all_reduce(loss)
    num_labels = sum(length - 1 for length in scenario.lengths)
    assert abs(float(loss) / num_labels - want["loss"]) <= TOLERANCE * want["loss"]
    assert (sum(map(float, result.stats.kl.values())) > 0) is (scenario.kl_weight > 0)
    check_gradients(engine, folder / GRADIENTS, hf)


def loaded_engine(scenario: Scenario, hf: HfModel, run_dir: Path, cp_size: int) -> TorchEngine:
    hf.attention.kl_weight = scenario.kl_weight
    if scenario.family == "m2":
        hf.attention.block_size = scenario.block_size
    config = RunConfig(
        engine=EngineKind.torch,
        model=hf.model,
        attention=hf.attention,
        parallel=ParallelConfig(cp_size=cp_size),
        data=DataConfig(seq_len=scenario.seq_len),
        optim=OptimConfig(clip_grad=0.0),
        train=TrainConfig(precision=Precision.fp32),
    )
    engine = TorchEngine(config, build_groups(config.parallel, device=torch.device("cpu")))
    template = {"model": engine.model.sharded_state_dict(metadata=checkpoint_metadata(engine.groups))}
    engine.model.load_state_dict(load_checkpoint(checkpoint_folder(run_dir), template)["model"])
    return engine


def pack_of(scenario: Scenario) -> Pack:
    """The documents one after another, each on a block boundary."""
    pack = make_pack(
        list(scenario.lengths),
        seq_len=scenario.seq_len,
        block_size=scenario.block_size,
        vocab_size=hf_models.VOCAB,
        seed=0,
    )
    for text, start in zip(hf_models.documents(scenario), pack.cu_seqlens.tolist(), strict=False):
        pack.tokens[start : start + len(text)] = text.numpy()
        pack.labels[start : start + len(text)] = [*text[1:].tolist(), IGNORE_LABEL]
    return pack


@torch.no_grad()
def check_logits(engine: TorchEngine, pack: Pack, scenario: Scenario, want: list[Tensor]) -> None:
    comm, stats = engine.groups.cp_comm(), LayerStats()
    params = engine.forward.prepare(pack, num_tokens=1, comm=comm, stats=stats)
    engine.model.eval()
    logits = engine.model(**forward_arguments(params.context.pack.tokens, None), packed_seq_params=params)
    logits = logits.view(-1, hf_models.VOCAB)
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits)
    whole = torch.cat(parts)
    starts = pack.cu_seqlens.tolist()
    got = [whole[start : start + len(one)] for start, one in zip(starts, want, strict=False)]
    assert_rows_close(torch.cat(got), torch.cat(want), TOLERANCE)


def check_gradients(engine: TorchEngine, folder: Path, hf: HfModel) -> None:
    wanted = read_keys(folder, hf)
    compared = 0
    for name, parameter in global_names(engine.model, ep_rank=0):
        if ".index_branch." in name:
            assert parameter.requires_grad is (hf.attention.kl_weight > 0)
            continue
        expert = _EXPERT.search(name)
        if expert:
            name = f"{name[: expert.start()]}.mlp.experts.experts.{name[expert.end() :]}"
        want = wanted[name][int(expert[1])] if expert else wanted[name]
        try:
            assert_rows_close(engine.gradients.view(parameter), want, TOLERANCE)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error
        assert expert or want.abs().max() > 0, name
        compared += 1
    assert compared == sum(".index_branch." not in name for name, _ in engine.model.named_parameters())


def read_keys(folder: Path, hf: HfModel) -> dict[str, Tensor]:
    """Our tensors put together from a Hugging Face checkpoint."""
    plan = plan_import(folder, hf)
    result: dict[str, Tensor] = {}
    for key, spans in plan.table.by_key().items():
        rows = [torch.empty(0)]
        for span in spans:
            shape = plan.table.hf_shapes[span.name]
            rows.append(torch.empty((span.num_rows, *shape[-1:]) if len(shape) > 1 else span.num_rows))
            plan.weights.read_into(span.name, span.name_row, rows[-1])
        result[key] = torch.cat(rows[1:]).view(plan.table.shapes[key])
    plan.weights.close()
    return result
