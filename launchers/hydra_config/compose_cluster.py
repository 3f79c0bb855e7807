"""Compose cluster=NAME and cluster.KEY=VALUE into a typed ClusterConfig; errors are a ValueError of one line.

Hydra has no part in it: a cluster is no part of a run, and its file holds lines of shell (`setup`), in which
${...} belongs to the shell.
"""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launchers.hydra_config.config_files import check_cluster_file
from launchers.hydra_config.options import CLUSTER, config_dir, group_options
from launchers.hydra_config.text_values import QUOTES, check_references
from msa_train.config import ClusterConfig, check_cluster

KEYS = [item.name for item in fields(ClusterConfig)]
# keys whose value, or that of every key below them, is text
TEXT_KEYS = {item.name for item in fields(ClusterConfig) if item.type in (str, dict[str, str])}


def compose_cluster(name: str, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> ClusterConfig:
    """Read one file of the group and change what the command line says.

    Args:
        name: of a file in conf/cluster or DIR/cluster.
        overrides: e.g. ["cluster.account=me", "cluster.network.NCCL_DEBUG=INFO"].
        config_dirs: folders with more files, under other names than ours.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    path = _file(name, config_dirs)
    node = OmegaConf.structured(ClusterConfig)
    # before OmegaConf reads it, which would expand aliases to any size
    check_cluster_file(path)
    try:
        node = OmegaConf.merge(node, OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_first_line(error)}; {_hint(error)}") from error
    # one by one, so that an error names the override that is wrong
    for text in overrides:
        key, _, value = text.removeprefix(f"{CLUSTER}.").partition("=")
        if key.partition(".")[0] not in KEYS:
            raise ValueError(f"{text}: there is no such key; {_nearest(key)}")
        try:
            OmegaConf.update(node, key, _value(key, value), merge=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"{text}: {_first_line(error)}") from error
    try:
        cluster = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ValueError(f"cluster={name}: {_first_line(error)}; correct {path}") from error
    assert isinstance(cluster, ClusterConfig), f"the schema is ClusterConfig, not {type(cluster)}"
    check_cluster(cluster)
    return cluster


def _file(name: str, config_dirs: Sequence[Path]) -> Path:
    """Find the one file of a cluster's name."""
    found = [folder / CLUSTER / f"{name}.yaml" for folder in (*config_dirs, config_dir())]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        # its lines of shell are run: which file that is must not depend on an order
        raise ValueError(
            f"cluster={name}: is the name of {' and of '.join(map(str, found))}; give yours another"
        )
    if found:
        return found[0]
    known = list(group_options(CLUSTER, config_dirs))
    match = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean cluster={match[0]}? " if match else ""
    raise ValueError(
        f"cluster={name}: there is no such cluster; {hint}the choices are {', '.join(known)}; your own is "
        "a file DIR/cluster/NAME.yaml with --config-dir DIR"
    )


def _value(key: str, value: str) -> Any:
    """Read a value: text as it is written, else YAML.

    Example: "account", "007" -> "007"; "workers", "8" -> 8; "network", "{A: b}" -> {"A": "b"}.
    """
    if not key.startswith("setup"):
        check_references(f"{CLUSTER}.{key}", value)
    if not value or (key.partition(".")[0] in TEXT_KEYS and not value.startswith((*QUOTES, "{"))):
        return value
    return yaml.safe_load(value)


def _nearest(key: str) -> str:
    """Ask whether the likest key is meant; else list all."""
    match = difflib.get_close_matches(key, KEYS, n=1)
    return f"did you mean cluster.{match[0]}?" if match else f"the keys are {', '.join(KEYS)}"


def _hint(error: Exception) -> str:
    """Say which keys there are, for an error inside a file."""
    key = getattr(error, "key", None)
    return _nearest(str(key)) if key and str(key) not in KEYS else f"the keys are {', '.join(KEYS)}"


def _first_line(error: Exception) -> str:
    """Take the first line of an error; OmegaConf adds more on its own types."""
    return str(error).strip().splitlines()[0]
