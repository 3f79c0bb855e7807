"""YAML that somebody else wrote: of limited size, also after its aliases are followed."""

from typing import Any

import yaml

from msa_train.config.text import excerpt

MAX_NODES = 100_000
"values of a file, each counted once for every alias that stands for it"


def check_yaml(text: str) -> None:
    """Look through a document without making its values.

    Raises:
        ValueError: without the path, e.g. "is not YAML (...)"; also for what is nested too deeply, contains
            itself, or grows by its aliases.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = 0 if root is None else num_values(root)
    except RecursionError:
        raise ValueError("is not YAML of a sensible depth (its values are nested too deeply)") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({excerpt(str(error))})") from None
    if size > MAX_NODES:
        raise ValueError(f"holds more than {MAX_NODES:,} values, aliases followed")


def parse_yaml(text: str) -> Any:
    """The value of a document.

    Raises:
        ValueError: as `check_yaml`.
    """
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        # a date that is none, a mapping with a list for a key
        raise ValueError(f"is not YAML ({excerpt(str(error))})") from None


class SelfReferenceError(ValueError):
    """A value contains itself; node: where."""

    def __init__(self, node: yaml.Node) -> None:
        super().__init__("holds a value that contains itself")
        self.node = node


def num_values(node: yaml.Node, known: dict[int, int] | None = None) -> int:
    """Values that a node stands for; each is counted once for every alias.

    Args:
        node: of a document.
        known: for calls of itself.

    Raises:
        SelfReferenceError: if one contains itself.
    """
    known = {} if known is None else known
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(num_values(child, known) for child in children)
    elif known[id(node)] < 0:
        raise SelfReferenceError(node)
    return known[id(node)]
