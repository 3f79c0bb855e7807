"""Take text on the command line and in files as it is written.

Hydra's grammar and YAML read numbers, booleans and lists first: run_dir=2024_01_02 would become 20240102 and
run_dir=runs/lr=1e-4 an error. What stands in ${...} may only be another key: no resolver, which could read
the environment of the machine.
"""

import re
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

QUOTES = ("'", '"')
# ${name}, ${data.seq_len}, ${.name}; not ${oc.env:HOME}, which calls a resolver; \${ is no reference
_REFERENCE = re.compile(r"(?<!\\)\$\{\.*[A-Za-z_]\w*(?:\.\w+)*\}")


def quoted(value: str) -> str:
    """Write a text for Hydra's grammar, whatever is in it: a b -> "a b"."""
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def literal(text: str) -> str:
    """Write KEY=VALUE of a key whose values are text, in quotes unless the value has them already.

    Example: run_dir=2024_01_02 -> run_dir="2024_01_02".
    """
    key, _, value = text.partition("=")
    return text if value.startswith(QUOTES) else f"{key}={quoted(value)}"


def split_choices(value: str) -> list[str]:
    """Split the values of a sweep over a text key, at commas outside quotes: a,"b,c" -> a and "b,c"."""
    return re.findall(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,])+""", value)


def check_references(key: str, value: str) -> None:
    """Check that nothing but other keys is referred to.

    Example: "runs/${name}" is right; "${oc.env:HOME}" and "???" are refused.

    Args:
        key: dotted, for the error.
        value: as it is written, not resolved.

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
    """Check the references in every value of a configuration that is not resolved yet.

    Raises:
        ValueError: as check_references.
    """
    _check_tree(OmegaConf.to_container(node, resolve=False), "")


def _check_tree(value: Any, key: str) -> None:
    """Check a value and all that is in it; key: its dotted name, as in "sbatch[0]"."""
    if isinstance(value, str):
        check_references(key, value)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_tree(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_tree(item, f"{key}[{index}]")


def _refuse_environment(*_: Any) -> Any:
    """Refuse to read the environment: it holds secrets, and a run must not depend on who starts it."""
    raise ValueError("the environment is not read by configurations")


# A list of defaults is put together before there is a configuration to look at: the checks above come too
# late for ${oc.env:...} in it, so the resolver itself refuses.
OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)
