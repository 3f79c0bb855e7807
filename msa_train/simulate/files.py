"""Reading small settings files, YAML or JSON, into dataclasses with clear errors."""

import math
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from msa_train.config.text import excerpt
from msa_train.foreign_files import parse_json, read_limited
from msa_train.foreign_yaml import parse_yaml

Settings = TypeVar("Settings")

# results of benchmarks, and clusters or rates, which are parsed slowly
_MAX_JSON_BYTES, _MAX_YAML_BYTES = 256 * 2**20, 2**20
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ValueError: if the file is missing, is neither, or holds something else.
    """
    is_json = path.suffix == ".json"
    try:
        text = read_limited(path, _MAX_JSON_BYTES if is_json else _MAX_YAML_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"{path}: cannot be read ({reason}); name a YAML or JSON file") from error
    try:
        # YAML reads 1e9 as text; JSON files may well hold such numbers
        data = parse_json(text) if is_json else parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair it") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: must hold names with values, holds {type(data).__name__}; see the shipped files"
        )
    return data


def build(kind: type[Settings], values: dict[str, Any], *, where: str) -> Settings:
    """A dataclass of numbers and texts from a mapping.

    Args:
        kind: the dataclass; its __post_init__ checks ranges.
        values: by field name.
        where: named in errors, e.g. a path.

    Raises:
        ValueError: on names that the class lacks, fields that are missing, values of another type.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"{where}: {excerpt(unknown[0])} is not a field; known are {', '.join(known)}")
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing; needed are {', '.join(_needed(known))}")
    try:
        return kind(**{name: _typed(known[name], value) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _needed(known: dict[str, Field[Any]]) -> list[str]:
    return [n for n, field in known.items() if field.default is MISSING and field.default_factory is MISSING]


def _typed(field: Field[Any], value: Any) -> Any:
    """The value as the field's type; 400e9 without a sign is text in YAML and a number here."""
    kind = field.type
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name}={value}: must be a finite number")
    if kind in _KINDS and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):  # type: ignore[arg-type]
        raise ValueError(f"{field.name}={excerpt(str(value))}: must be {_KINDS[kind]}")  # type: ignore[index]
    return value
