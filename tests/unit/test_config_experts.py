"""`parallel.moe_dispatcher`: one line where DeepEP cannot be."""

import pytest

from launchers.hydra_config.compose import compose_run
from launchers.local import kernel_checks
from launchers.local.kernel_checks import check_dispatcher_package
from launchers.local.launch_checks import plan_layout
from msa_train.config import MoeDispatcher, RunConfig
from msa_train.config.rules.experts import check_dispatcher
from msa_train.model.layers.moe import deepep
from msa_train.model.transformer_config import build_transformer_config


def deepep_run(*overrides: str) -> RunConfig:
    bf16 = ["run=demo", "parallel.moe_dispatcher=deepep", "parallel.ep_size=2", "train.precision=bf16"]
    return compose_run([*bf16, *overrides])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("parallel.ep_size=1", "parallel.ep_size=1 is one; use a larger parallel.ep_size"),
        ("parallel.ep_size=6", "no settings for parallel.ep_size=6; use one of 2, 4, 8"),
        ("parallel.ep_size=256", "no settings for parallel.ep_size=256"),
        ("train.precision=fp32", "not of train.precision=fp32; use train.precision=bf16"),
        ("train.precision=fp64", "not of train.precision=fp64; use train.precision=bf16"),
        ("train.deterministic=true", "use train.deterministic=false"),
        ("model.hidden_size=100", "use model.hidden_size=104"),
    ],
)
def test_refused_in_one_line(override: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^parallel\.moe_dispatcher=deepep: ") as raised:
        check_dispatcher(deepep_run(override))
    assert text in str(raised.value)
    assert str(raised.value).endswith(", or parallel.moe_dispatcher=alltoall")
    assert "\n" not in str(raised.value)


def test_what_it_can_run_with() -> None:
    check_dispatcher(deepep_run("train.tile_tokens=512", "train.recompute=full"))
    check_dispatcher(compose_run(["run=demo"]))


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepep_run()
    monkeypatch.setattr(kernel_checks, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="deep_ep package is not installed; install DeepEP, or use"):
        check_dispatcher_package(config, on_gpu=True)
    check_dispatcher_package(config, on_gpu=True, is_here=False)
    check_dispatcher_package(compose_run(["run=demo"]), on_gpu=False)
    monkeypatch.setattr(kernel_checks, "find_spec", lambda name: name)
    check_dispatcher_package(config, on_gpu=True)
    with pytest.raises(ValueError, match="runs on GPUs and none is used; use GPUs, or use"):
        check_dispatcher_package(config, on_gpu=False)
    # as `--check` and every launch do
    with pytest.raises(ValueError, match=r"^parallel\.moe_dispatcher=deepep: runs on GPUs"):
        plan_layout(config)
    with pytest.raises(ValueError, match="deep_ep package cannot be imported"):
        deepep.check_installed()


def test_default() -> None:
    config = RunConfig()
    assert config.parallel.moe_dispatcher is MoeDispatcher.alltoall
    assert build_transformer_config(config).moe_dispatcher is MoeDispatcher.alltoall
