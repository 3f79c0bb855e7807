"""`model.implementation`: one line where it cannot be; classes and arguments of Megatron's wrappers."""

import ast
from pathlib import Path

import pytest
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from launchers.hydra_config.compose import compose_run
from launchers.local import kernel_checks
from msa_train.config import Implementation, ModelConfig, Recompute, RunConfig, TrainConfig
from msa_train.config.rules.recompute import check_recompute
from msa_train.model import gpt
from msa_train.model.implementation import layer_classes
from msa_train.model.layers.norm import RMSNorm
from msa_train.model.transformer_config import build_transformer_config

ENGINE = Implementation.transformer_engine
# what specs and Megatron's own modules pass by name
COLUMN = {"config", "init_method", "gather_output", "bias", "skip_bias_add", "is_expert", "tp_group"}
ROW = {"config", "init_method", "bias", "input_is_parallel", "skip_bias_add", "is_expert", "tp_group"}


def test_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["run=demo", "model.implementation=transformer_engine"])
    missing = lambda name: None  # noqa: E731
    monkeypatch.setattr(kernel_checks, "find_spec", missing)
    with pytest.raises(ValueError, match="transformer-engine package is not installed; install it, or use"):
        kernel_checks.check_implementation(config, on_gpu=True)
    monkeypatch.setattr(kernel_checks, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="runs on GPUs and none is used"):
        kernel_checks.check_implementation(config, on_gpu=False)
    fp64 = compose_run(["run=demo", "model.implementation=transformer_engine", "train.precision=fp64"])
    with pytest.raises(ValueError, match="has no fp64"):
        kernel_checks.check_implementation(fp64, on_gpu=True)
    bf16 = compose_run(["run=demo", "model.implementation=transformer_engine", "train.precision=bf16"])
    kernel_checks.check_implementation(bf16, on_gpu=True)
    monkeypatch.setattr(kernel_checks, "find_spec", missing)
    kernel_checks.check_implementation(compose_run(["run=demo"]), on_gpu=True)


def test_its_norms_are_not_recomputed() -> None:
    train = TrainConfig(recompute=Recompute.selective)
    config = RunConfig(model=ModelConfig(implementation=ENGINE), train=train)
    with pytest.raises(ValueError, match="leave norm out"):
        check_recompute(config)


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = layer_classes(Implementation.torch)
    assert (classes.column, classes.row, classes.norm) == (ColumnParallelLinear, RowParallelLinear, RMSNorm)
    monkeypatch.setattr(te, "HAVE_TE", False)
    with pytest.raises(ValueError, match="cannot be imported; install it, or use"):
        layer_classes(ENGINE)


def test_spec_names_them_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense projections, dense and shared feed-forward networks and norms; experts stay."""
    monkeypatch.setattr(te, "HAVE_TE", True)
    column, row, norm = (type(name, (), {}) for name in ("Column", "Row", "Norm"))
    for name, stand_in in (("ColumnParallelLinear", column), ("RowParallelLinear", row), ("Norm", norm)):
        monkeypatch.setattr(te, f"TE{name}", stand_in)
    config = build_transformer_config(RunConfig(model=ModelConfig(implementation=ENGINE)))
    for number in (1, 2):
        parts = gpt._layer_spec(config, number).submodules
        assert parts.input_layernorm is parts.pre_mlp_layernorm is norm
        attention = parts.self_attention.submodules
        assert (attention.linear_qkv, attention.linear_proj) == (column, row)
        mlp = parts.mlp.submodules
        if number == 2:
            experts = mlp.experts.submodules
            assert (experts.linear_fc1, experts.linear_fc2) == (ColumnParallelLinear, RowParallelLinear)
            mlp = mlp.shared_experts.submodules
        assert (mlp.linear_fc1, mlp.linear_fc2) == (column, row)


def test_wrappers_take_what_we_pass() -> None:
    """Read from Megatron's source: without the package its classes are stand-ins."""
    source = Path(te.__file__).read_text()
    taken: dict[str, set[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__"):
                    arguments = method.args.args + method.args.kwonlyargs
                    taken[node.name] = {argument.arg for argument in arguments}
    assert COLUMN | {"tp_comm_buffer_name", "stride"} <= taken["TEColumnParallelLinear"]
    assert ROW | {"tp_comm_buffer_name"} <= taken["TERowParallelLinear"]
    assert {"config", "hidden_size", "eps"} <= taken["TENorm"]
