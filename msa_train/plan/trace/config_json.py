"""Give a run's configuration to another process as JSON, and take it back; nothing of Hydra is needed."""

import types
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from msa_train.config import RunConfig


def config_to_json(config: RunConfig) -> dict[str, Any]:
    """Turn a configuration into JSON's types; enums become their values."""
    return _plain(asdict(config))


def config_from_json(values: dict[str, Any]) -> RunConfig:
    """Build the configuration that `config_to_json` was given.

    Raises:
        TypeError: for a key that there is not.
    """
    return _build(RunConfig, values)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise TypeError(f"{kind.__name__} has no field {unknown[0]}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        wanted = [part for part in arguments if part is not type(None)]
        return None if value is None else _value(wanted[0], value)
    if origin is dict:
        return {key: _value(arguments[1], part) for key, part in value.items()}
    if origin in (list, tuple):
        parts = [_value(arguments[0], part) for part in value]
        return tuple(parts) if origin is tuple else parts
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return _build(hint, value) if is_dataclass(hint) else value
