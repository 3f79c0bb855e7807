"""Compose command-line overrides into a typed RunConfig, and write it to a YAML file and read it back.

Hydra is used as a library, for the errors of its own entry point are many lines long. Here each is a
ValueError of one line that names the value, the rule and the fix.

Under srun with a task per rank every rank composes for itself, from files that all of them read: 256 times
the same work at once, and no rank has to wait for another to learn that a key is misspelt.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launchers.hydra_config.config_files import check_config_dirs
from launchers.hydra_config.options import OPTION_GROUPS, config_dir, group_options
from launchers.hydra_config.text_values import check_all_references, check_references, literal, quoted
from launchers.local.machine import expand_user
from msa_train.config import RunConfig, StageConfig, check_texts
from msa_train.config.text import excerpt
from msa_train.runtime.untrusted_files import read_limited
from msa_train.runtime.untrusted_yaml import check_yaml

ConfigStore.instance().store(name="schema", node=RunConfig)

_MAX_CONFIG_BYTES = 2**20
EVERY_KEY = "every key is printed by: msa-train run=demo --cfg"
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "{key: value}",
}
# mappings whose keys are not ours to know
_FREE_KEYS = re.compile(r"(deepspeed\.raw|data\.mixture|stages\.\w+\.mixture)(\..*)?")
"below these any name may stand; rules say what is wrong with one"
_FREE_TEXT = re.compile(r"data\.mixture\.\w+\.corpus")
"of them those whose values are text"


def compose_run(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> RunConfig:
    """Put a run together.

    Args:
        overrides: group choices and values, e.g. ["run=demo", "train.steps=50"].
        config_dirs: folders with more options of the groups; ours come first.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    # before Hydra sees them: it would build what a stranger's file asks for
    check_config_dirs(config_dirs, text_keys())
    parsed = [_parse(text) for text in overrides]
    written = [hydra_override(text) for text in overrides]
    # Which stages there are depends on the run, so the choices are composed once without any value of a
    # stage. Only then is it known which keys `stages.NAME.KEY` exist.
    given = [text for text in written if not text.lstrip("+").startswith("stages.")]
    composed, stages = _without_stage_values(given, config_dirs)
    keys = known_keys(stages)
    schema = OmegaConf.structured(RunConfig)
    schema.stages = {name: StageConfig() for name in stages}
    for text, override in zip(overrides, parsed, strict=True):
        if override.key_or_group in OPTION_GROUPS:
            _check_choice(text, override, config_dirs)
        else:
            _check_value(text, override, keys, schema)
    if not any(override.key_or_group == "run" for override in parsed):
        choices = ", ".join(f"run={name}" for name in group_options("run", config_dirs))
        raise ValueError(f"run: none is chosen and there is no default; use one of {choices}")
    try:
        if composed is None or len(given) < len(written):
            composed = _compose(written, config_dirs)
        return run_config(composed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(_explain(error, keys)) from error


def _compose(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Any:
    """Let Hydra put files and overrides together; nothing is resolved yet."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=[*overrides, *_search_path(config_dirs)])


def _without_stage_values(overrides: Sequence[str], config_dirs: Sequence[Path]) -> tuple[Any, list[str]]:
    """Compose the chosen run and list its stages; None and none where the overrides are at fault."""
    try:
        composed = _compose(overrides, config_dirs)
        return composed, [str(name) for name in composed.stages]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None, []


def config_to_yaml(config: RunConfig) -> str:
    """Write the whole configuration as YAML, with nothing left to resolve."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load_run(path: str | Path) -> RunConfig:
    """Read a file that `config_to_yaml` has written; it may be damaged, or another person's.

    Args:
        path: of the file, at most 1 MiB.

    Raises:
        ValueError: where the file does not hold a RunConfig.
    """
    try:
        text = read_limited(Path(path), _MAX_CONFIG_BYTES).decode("utf-8")
        check_yaml(text)
        given = OmegaConf.create(text)
        if not isinstance(given, DictConfig):
            raise ValueError("holds no settings by name")
        return run_config(OmegaConf.merge(OmegaConf.structured(RunConfig), given))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {excerpt(_explain(error, known_keys()), 400)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {excerpt(str(error), 400)}") from error


def text_keys() -> set[str]:
    """List the dotted keys whose values are text, e.g. "run_dir"."""
    return {key for key, kind in known_keys().items() if kind is str}


def hydra_override(text: str) -> str:
    """Write KEY=VALUE for Hydra, with names and text in quotes, so that they stay as they were written.

    Example: name=2024_01 -> name="2024_01", which would be the number 202401; train.steps=50 -> the same.
    """
    # every key exists, so that a leading + changes nothing; Hydra would refuse it
    text = text.lstrip("+")
    key = text.partition("=")[0]
    if _FREE_KEYS.fullmatch(key):
        # what is below need not exist yet
        return f"++{literal(text) if _FREE_TEXT.fullmatch(key) else text}"
    return literal(text) if key in OPTION_GROUPS or key in text_keys() else text


def known_keys(stages: Sequence[str] = ()) -> dict[str, Any]:
    """List every dotted key with its type.

    Args:
        stages: names of the run's stages, each of which has the keys `stages.NAME.KEY`.

    Example: {"train.steps": int, "engine": EngineKind, ...}.
    """
    return _walk(RunConfig, "", stages)


def _walk(section: type, prefix: str, stages: Sequence[str]) -> dict[str, Any]:
    """Collect the keys of a dataclass and of those in its fields."""
    keys: dict[str, Any] = {}
    for item in fields(section):
        if is_dataclass(item.type):
            keys.update(_walk(item.type, f"{prefix}{item.name}.", stages))  # type: ignore[arg-type]
        elif item.type == dict[str, Any]:
            keys[prefix + item.name] = dict
        elif get_origin(item.type) is dict:
            for name in stages:
                keys.update(_walk(get_args(item.type)[1], f"{prefix}{item.name}.{name}.", stages))
        else:
            keys[prefix + item.name] = item.type
    return keys


def run_config(node: Any) -> RunConfig:
    """Build the typed configuration that a node of the schema stands for.

    Args:
        node: an OmegaConf node of the schema RunConfig, not resolved yet.

    Raises:
        ValueError: naming a value that refers to something else than a key, or a text that cannot be stored.
    """
    # to_object resolves ${...}: what they may refer to is checked before
    check_all_references(node)
    config = OmegaConf.to_object(node)
    assert isinstance(config, RunConfig), f"the schema is RunConfig, not {type(config)}"
    # shells leave the ~ of run_dir=~/x alone
    config.run_dir = expand_user("run_dir", config.run_dir)
    config.checkpoint.load = expand_user("checkpoint.load", config.checkpoint.load)
    check_texts(config)
    return config


def _parse(text: str) -> Override:
    """Parse one override; what is not KEY=VALUE with one value is refused with the fix that fits."""
    key, equals, value = text.partition("=")
    if text.startswith("~"):
        raise ValueError(
            f"{text}: keys cannot be removed; set a value, as in {text[1:].partition('=')[0]}=..."
        )
    if not equals:
        hint = f"{key}=VALUE"
        for group in OPTION_GROUPS:
            if key in group_options(group):
                hint = f"{group}={key}"
                break
        raise ValueError(f"{text}: is not of the form key=value; use {hint}")
    if text.startswith("--"):
        raise ValueError(f"{text}: options take no value; a setting is written without dashes: {text[2:]}")
    try:
        override = OverridesParser.create().parse_override(hydra_override(text))
    except HydraException:
        fix = f"""'{key}="{value}"'"""
        raise ValueError(f"{text}: cannot be read as key=value; quote the value, as in {fix}") from None
    if override.is_sweep_override():
        fix = f"""'{key}="{value}"'"""
        raise ValueError(
            f"{text}: is a sweep, one run takes one value; start it once per value, or quote: {fix}"
        )
    return override


def _search_path(config_dirs: Sequence[Path]) -> list[str]:
    """Write the override that shows Hydra more folders.

    Example: [Path("/mine")] -> ['hydra.searchpath=["file:///mine"]'].
    """
    if not config_dirs:
        return []
    places = ", ".join(quoted(f"file://{folder.absolute()}") for folder in config_dirs)
    return [f"hydra.searchpath=[{places}]"]


def _check_choice(text: str, override: Override, config_dirs: Sequence[Path]) -> None:
    """Refuse an option that its group does not have."""
    group, choice = override.key_or_group, override.value()
    options = list(group_options(group, config_dirs))
    if choice not in options:
        value = text.partition("=")[2]
        raise ValueError(
            f"{group}={value}: there is no such {group}; {_nearest(value, options, f'{group}=')}"
            f"the choices are {', '.join(options)}"
        )


def _check_value(text: str, override: Override, keys: dict[str, Any], schema: Any) -> None:
    """Refuse an unknown key and a value of another type, by setting it in a schema of defaults.

    Hydra would find both, but inside a composition, where the text that the user wrote is not known any more.
    """
    key, value = override.key_or_group, text.partition("=")[2]
    check_references(key, value)
    free = _FREE_KEYS.fullmatch(key)
    # below a key that there is, so that a misspelt stage does not become a new one
    if free and free[2] and free[1] in keys:
        return
    if key not in keys:
        raise ValueError(f"{key}={value}: {_unknown_key(key, keys)}")
    try:
        OmegaConf.update(schema, key, override.value())
    except OmegaConfBaseException:
        raise ValueError(f"{key}={value}: must be {_expected(keys[key], value)}") from None


def _unknown_key(key: str, keys: dict[str, Any]) -> str:
    """Say that there is no such key, and which one may be meant.

    Example: "cp_size" or "paralel.cp_size" -> "there is no such key; did you mean parallel.cp_size?".
    """
    names = [*keys, *OPTION_GROUPS]
    last = key.rpartition(".")[2]
    # cp_size=4 and paralel.cp_size=4 both mean parallel.cp_size; a shared last part beats likeness
    same_last = [name for name in names if name.rpartition(".")[2] == last]
    same_last = difflib.get_close_matches(key, same_last, n=3, cutoff=0.0)
    nearest = same_last or difflib.get_close_matches(key, names, n=1)
    if not nearest:
        by_last = {name.rpartition(".")[2]: name for name in names}
        nearest = [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1)]
    if not nearest:
        return f"there is no such key; {EVERY_KEY}"
    return f"there is no such key; did you mean {' or '.join(nearest)}?"


def _nearest(value: str, options: Sequence[str], prefix: str = "") -> str:
    """Ask whether the likest option is meant; empty if none is like it."""
    match = difflib.get_close_matches(value, options, n=1)
    return f"did you mean {prefix}{match[0]}? " if match else ""


def _expected(kind: Any, value: str) -> str:
    """Describe the values of a type, and offer one: int, "4.0" -> "a whole number; use 4"."""
    if issubclass(kind, Enum):
        choices = list(kind.__members__)
        return f"one of {', '.join(choices)}; {_nearest(value, choices)}".rstrip("; ")
    name = TYPE_NAMES[kind]
    if kind is int:
        try:
            return f"{name}; use {round(float(value))}"
        except (ValueError, OverflowError):
            return f"{name}, such as 4"
    return name


def _explain(error: Exception, keys: dict[str, Any]) -> str:
    """Write one line for an error inside a file, where no command-line override is at fault."""
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines()]
    text = "; ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=")))
    if not key:
        return text
    if key in keys:
        return f"{key}: {text}"
    return f"{key}: {text}; {_unknown_key(key, keys)}"
