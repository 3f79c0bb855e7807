"""Configuration files from --config-dir, looked at before Hydra reads them: they may be a stranger's.

They hold settings of a run and nothing else: no settings of Hydra, which could name code to call, no way out
of their folder, nothing that grows while it is read. And text that YAML would take for a number is not
changed behind the user's back. Costs some milliseconds per file, on every rank that torchrun or srun started.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from launchers.groups import CLUSTER, GROUPS
from launchers.text_values import check_references
from msa_train.config import ClusterConfig, check_text
from msa_train.foreign_yaml import MAX_NODES, SelfReferenceError, num_values

MAX_BYTES = 2**20
_PACKAGE = re.compile(r"^#\s*@package[ \t]*(.*)$", re.MULTILINE)
_STR_TAG = "tag:yaml.org,2002:str"


def check_config_dirs(folders: Sequence[Path], text_keys: set[str]) -> None:
    """Check every file that options of a run can come from.

    Args:
        folders: given by --config-dir.
        text_keys: dotted keys whose values are text.

    Raises:
        ValueError: naming the file, the line, the rule and the fix.
    """
    for folder in folders:
        check_text("--config-dir", str(folder.absolute()))
        if "${" in str(folder.absolute()):
            raise ValueError(f"--config-dir={folder}: must not contain ${{; name another")
        if not any((folder / group).is_dir() for group in (*GROUPS, CLUSTER)):
            raise ValueError(
                f"--config-dir={folder}: holds none of the folders {', '.join((*GROUPS, CLUSTER))}; "
                "name another"
            )
        if (folder / "hydra").exists():
            raise ValueError(
                f"{folder / 'hydra'}: settings of Hydra cannot come from --config-dir; remove the folder"
            )
        for group in GROUPS:
            for path in sorted((folder / group).glob("*.yaml")):
                check_file(path, group, text_keys)


def check_cluster_file(path: Path) -> None:
    """Check a file of the group `cluster`.

    Raises:
        ValueError: as check_config_dirs.
    """
    # a list or a mapping stands for all that is in it
    names = {
        f"{CLUSTER}.{item.name}" for item in fields(ClusterConfig) if item.type not in (int, float, bool)
    }
    check_file(path, CLUSTER, names)


def check_file(path: Path, group: str, text_keys: set[str]) -> None:
    """Check one file.

    Raises:
        ValueError: as check_config_dirs.
    """
    text = _read(path)
    root = _parse(path, text)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: must hold KEY: VALUE; correct it")
    _check_size(root, path)
    prefix = _prefix(path, text, group)
    for key, value in root.value:
        if key.value in ("hydra", "<<"):
            raise _refused(path, key, f"{key.value}: a file holds settings of the run alone", "remove it")
        if key.value == "defaults" and group != CLUSTER:
            _check_defaults(path, value)
    for key, node in _leaves(root, prefix):
        if not key.startswith("defaults"):
            _check_scalar(path, key, node, text_keys)


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES} bytes, as no settings are; remove it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _parse(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=get_yaml_loader())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())}); correct it") from None


def _check_size(root: yaml.Node, path: Path) -> None:
    try:
        size = num_values(root)
    except SelfReferenceError as error:
        raise _refused(path, error.node, "a value cannot contain itself", "write it out") from None
    if size > MAX_NODES:
        raise ValueError(f"{path}: grows to more than {MAX_NODES} values by its aliases; write them out")


def _prefix(path: Path, text: str, group: str) -> str:
    """Where in the configuration the file's keys are put."""
    match = _PACKAGE.search(text)
    package = match[1].strip() if match else "_group_"
    known = {"_group_": f"{group}.", group: f"{group}.", "_global_": ""}
    if package not in known:
        raise ValueError(
            f"{path}: has @package {package}; use _global_, or leave it out for the keys of {group}"
        )
    return known[package]


def _check_defaults(path: Path, node: yaml.Node) -> None:
    """Options of groups, by name: demo, /model: tiny, override /model: tiny, _self_."""
    for key, item in _leaves(node, "", with_keys=True):
        for text in (key, item.value):
            # a group's option is one of its files: nothing below, beside or above it
            name = text.removeprefix("optional ").removeprefix("override ").strip()
            group = name.removeprefix("/")
            is_group = group in GROUPS and name != group
            is_option = re.fullmatch(r"[\w-][\w.-]*|", name) is not None and "hydra" not in name
            if not is_group and not is_option:
                raise _refused(
                    path,
                    item,
                    f"defaults may only name options of the groups {', '.join(GROUPS)}, not {text!r}",
                    "write 'override /GROUP: OPTION'",
                )


def _leaves(
    node: yaml.Node, prefix: str, *, with_keys: bool = False
) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Scalars with their dotted keys, or with the key alone that they stand under."""
    if isinstance(node, yaml.ScalarNode):
        yield prefix.removesuffix("."), node
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _leaves(value, f"{key.value}." if with_keys else f"{prefix}{key.value}.")
    else:
        for value in node.value:
            yield from _leaves(value, prefix, with_keys=with_keys)


def _check_scalar(path: Path, key: str, node: yaml.ScalarNode, text_keys: set[str]) -> None:
    is_text = key in text_keys or any(key.startswith(f"{name}.") for name in text_keys)
    if not key.startswith(f"{CLUSTER}.setup"):
        try:
            check_references(key, node.value)
        except ValueError as error:
            raise ValueError(f"{path}, line {node.start_mark.line + 1}: {error}") from None
    if is_text and node.tag != _STR_TAG:
        value = _constructed(path, node)
        if str(value) != node.value:
            raise _refused(
                path,
                node,
                f"{key}: {node.value}: YAML takes it for {'nothing' if value is None else value}",
                f'put it in quotes: "{node.value}"',
            )


def _constructed(path: Path, node: yaml.Node) -> Any:
    try:
        return get_yaml_loader()("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError):
        raise _refused(
            path, node, f"{node.value}: is no value of the kind {node.tag}", "correct it"
        ) from None


def _refused(path: Path, node: yaml.Node, rule: str, fix: str) -> ValueError:
    return ValueError(f"{path}, line {node.start_mark.line + 1}: {rule}; {fix}")
