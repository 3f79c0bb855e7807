"""Every run and preset composes and passes the rules; the schema and the YAML files agree."""

from pathlib import Path

import pytest
import yaml

from launchers.hydra_config.compose import compose_run, config_to_yaml, known_keys, load_run
from launchers.hydra_config.options import CLUSTER, OPTION_GROUPS, config_dir, group_options
from msa_train.config import AttentionKind, RunConfig, check_rules
from msa_train.config.model_size import model_size

# processes that the large runs are made for; the others run on 2
WORLD_SIZES = {
    "pretrain": 4,
    "m2_32k": 128,
    "m3_200k": 128,
    "m3_1m": 256,
    "extend_200k_to_1m": 256,
    "extend_m2_200k_to_1m": 128,
    "extend_m2_64": 64,
    "extend_m3_64": 64,
}
RUNS = sorted(path.stem for path in (config_dir() / "run").glob("*.yaml"))
FILES = sorted(
    path.relative_to(config_dir())
    for path in config_dir().glob("*/*.yaml")
    if path.parent.name != CLUSTER  # no part of a run
)


@pytest.mark.parametrize("run", RUNS)
def test_run_passes_the_rules(run: str) -> None:
    config = compose_run([f"run={run}"])
    world_size = WORLD_SIZES.get(run, 2)
    check_rules(config, world_size=world_size, has_gpu=world_size > 2)
    assert config.name == run
    assert config.run_dir == f"runs/{run}"


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] != "run"], ids=str)
def test_option_of_a_group_composes(file: Path) -> None:
    compose_run(["run=demo", f"{file.parts[0]}={file.stem}"])


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_has_a_description_and_known_keys(file: Path) -> None:
    assert group_options(file.parts[0])[file.stem]
    content = yaml.safe_load((config_dir() / file).read_text())
    prefix = "" if file.parts[0] == "run" else f"{file.parts[0]}."
    content.pop("defaults", None)
    stages = content if file.parts[0] == "stages" else content.get("stages", {})
    # names of sources are checked with the rules, by test_run_passes_the_rules
    keys = {key for key in _leaves(content, prefix) if ".mixture." not in key}
    assert keys - {"stages"} <= set(known_keys(list(stages)))


@pytest.mark.parametrize("preset", sorted(group_options("model")))
def test_model_preset_leaves_no_shape_to_defaults(preset: str) -> None:
    content = yaml.safe_load((config_dir() / "model" / f"{preset}.yaml").read_text())
    shapes = {key.removeprefix("model.") for key in known_keys() if key.startswith("model.")}
    # rope_type says that nothing is scaled: what would scale has no effect
    scaling = {key for key in shapes if key.startswith("rope_")} - {"rope_theta", "rope_type"}
    assert content["rope_type"] == "default"
    assert shapes - scaling - set(content) <= {
        "implementation",
        "router_bias_update_rate",
        "init_std",
        "embedding_init_std",
        "embedding_shared_std",
    }


def test_groups_are_the_sections_of_the_schema() -> None:
    sections = {key.partition(".")[0] for key in known_keys(["any"]) if "." in key}
    assert {*OPTION_GROUPS} == {"run", *sections}
    assert {path.name for path in config_dir().iterdir() if path.is_dir()} == {*OPTION_GROUPS, CLUSTER}


def test_defaults_are_those_of_the_dataclasses() -> None:
    config = compose_run(["run=demo", "model=tiny"])
    assert config.model == RunConfig().model


@pytest.mark.parametrize(
    ("preset", "total", "experts"),
    [
        ("tiny", 921_168, 393_216),
        ("m2", 228.7e9, 224.7e9),
        ("m3", 426.2e9, 413.1e9),
        ("msa_109b", 107.4e9, 103.3e9),
    ],
)
def test_parameter_counts(preset: str, total: float, experts: float) -> None:
    config = compose_run(["run=demo", f"model={preset}", "attention=msa"])
    size = model_size(config.model, config.attention)
    assert size.total == pytest.approx(total, rel=5e-4)
    assert size.experts == pytest.approx(experts, rel=5e-4)
    assert 0 < size.active < size.total


def test_m3_uses_full_attention_in_its_first_three_layers() -> None:
    kinds = compose_run(["run=demo", "model=m3"]).model.attention_kinds()
    assert kinds == [AttentionKind.full] * 3 + [AttentionKind.msa] * 57


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = compose_run(["run=demo", "optim.lr=1e-5", "data.corpus='a, b'", "train.steps=7"])
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_run(path) == config
    assert config.data.corpus == "a, b"


def test_group_on_the_command_line_beats_the_run() -> None:
    config = compose_run(["model=m3", "run=demo", "attention=msa"])
    assert config.model.name == "m3"
    assert config.attention.block_size == 128


def test_run_dir_follows_the_name() -> None:
    assert compose_run(["run=demo", "name=mine"]).run_dir == "runs/mine"


def _leaves(node: object, prefix: str) -> list[str]:
    if not isinstance(node, dict):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}{key}.")]
