"""Reading small settings files, YAML or JSON, into dataclasses with clear errors."""

import json
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

Settings = TypeVar("Settings")

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ValueError: if the file is missing, is neither, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"{path}: cannot be read ({reason}); name a YAML or JSON file") from error
    try:
        # YAML reads 1e9 as text; JSON files may well hold such numbers
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path}: is not valid YAML or JSON ({line}); repair it") from error
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
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} is not a field; known are {', '.join(known)}")
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
        try:
            return float(value)
        except ValueError:
            pass
    if kind in _KINDS and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):  # type: ignore[arg-type]
        raise ValueError(f"{field.name}={value}: must be {_KINDS[kind]}")  # type: ignore[index]
    return value
