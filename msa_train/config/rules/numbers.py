"""Check rules that hold for every number of a configuration."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast


def check_finite_numbers(config: Any, section: str = "") -> None:
    """Refuse not-a-number and infinity anywhere in a configuration: nothing means them, and they spread.

    Args:
        config: a dataclass of settings.
        section: where it stands, e.g. "cluster.".

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for name, value, default in _floats(config, section):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be a finite number; use {name}={default}, the default")


def _floats(config: Any, section: str) -> Iterator[tuple[str, float, object]]:
    """Yield name, value and default of every float."""
    for field in fields(config):
        name, value = f"{section}{field.name}", getattr(config, field.name)
        parts: dict[str, Any] = {name: value}
        if isinstance(value, dict):
            entries = cast(dict[str, Any], value)
            parts = {f"{name}.{key}": entry for key, entry in entries.items()}
        for part_name, part in parts.items():
            if is_dataclass(part):
                yield from _floats(part, f"{part_name}.")
            elif isinstance(part, float):
                yield part_name, part, field.default
