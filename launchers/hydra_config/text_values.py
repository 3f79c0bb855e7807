"""Text on the command line and in files is taken as it is written.

Hydra's grammar and YAML read numbers, booleans and lists first: run_dir=2024_01_02 would become 20240102 and
run_dir=runs/lr=1e-4 an error. What stands in ${...} may only be another key: no resolver, which could read
the environment of the machine.
"""

import re
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

QUOTES = ("'", '"')
# ${name}, ${data.seq_len}, ${.name}
_REFERENCE = re.compile(r"(?<!\\)\$\{\.*[A-Za-z_]\w*(?:\.\w+)*\}")


def quoted(value: str) -> str:
    """A text as Hydra's grammar reads it, whatever is in it: a b -> "a b"."""
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def literal(text: str) -> str:
    """KEY=VALUE of a key whose values are text, with the value in quotes unless it has them already.

    Example: run_dir=2024_01_02 -> run_dir="2024_01_02".
    """
    key, _, value = text.partition("=")
    return text if value.startswith(QUOTES) else f"{key}={quoted(value)}"


def split_choices(value: str) -> list[str]:
    """Values of a sweep over a text key: a,"b,c" -> a, "b,c"."""
    return re.findall(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,])+""", value)


def check_references(key: str, value: str) -> None:
    """Check that nothing but other keys is referred to.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if value == "???":
        raise ValueError(
            f"{key}=???: stands for a value that is missing, and would become the default; set it"
        )
    if "${" in _REFERENCE.sub("", value):
        raise ValueError(
            f"{key}={value}: only other keys may stand in ${{...}}, as in ${{name}}; on the command line let "
            "the shell put in the rest"
        )


def check_all_references(node: Any) -> None:
    """`check_references` for every value of a configuration that is not resolved yet.

    Raises:
        ValueError: as check_references.
    """
    _check_tree(OmegaConf.to_container(node, resolve=False), "")


def _check_tree(value: Any, key: str) -> None:
    if isinstance(value, str):
        check_references(key, value)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_tree(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_tree(item, f"{key}[{index}]")


def _refuse_environment(*_: Any) -> Any:
    raise ValueError("the environment is not read by configurations")


# A list of defaults is put together before there is a configuration to look at.
OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)
