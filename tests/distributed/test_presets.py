"""Every model preset, built with Megatron on the meta device, has the published number of parameters."""

import pytest
import torch

from launchers.hydra_config.compose import compose_run
from msa_train.config.model_size import model_size
from msa_train.model.gpt import build_model
from msa_train.parallel.process_groups import build_groups
from tests.helpers.parameter_count import ParameterCount, count_parameters
from tests.helpers.spawn import run_ranks

# Billions, total and active: MiniMax-M2 report (arXiv 2605.26494); MiniMax-M3 model card, of the published
# "22 to 23" the upper end; MSA paper (arXiv 2606.13392).
PUBLISHED = {"m2": (229.9, 9.8), "m3": (428.0, 23.0), "msa_109b": (109.0, 6.0)}


def count(rank: int, world_size: int, preset: str) -> ParameterCount:
    config = compose_run(["run=demo", f"model={preset}", "attention=msa", "parallel=single", "train=bf16"])
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    with torch.device("meta"):
        model = build_model(config, groups.collection)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return count_parameters(model)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_size(preset: str) -> None:
    counted = run_ranks(1, count, preset)[0]
    total, active = (number / 1e9 for number in (counted.total, counted.active))
    assert total == pytest.approx(PUBLISHED[preset][0], rel=0.02)
    assert active == pytest.approx(PUBLISHED[preset][1], rel=0.02)
    config = compose_run(["run=demo", f"model={preset}", "attention=msa", "parallel=single"])
    arithmetic = model_size(config.model, config.attention)
    # The launcher's arithmetic counts the router biases too, which are buffers of the model.
    biases = config.model.num_experts * (config.model.num_layers - config.model.num_dense_ffn_layers)
    assert arithmetic.total == counted.total + biases
