"""Read the rotary embedding in a config.json, which may be said in three places: they must agree."""

from typing import Any

from msa_train.convert.config_fields import Family, Fields

_ROPE_THETA = 5000000.0


def read_rotary(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Read rope_theta and rotary_dim from rope_parameters, rope_scaling (its older name) and fields beside.

    Example: {"rope_theta": 5e6, "partial_rotary_factor": 0.5} and head_dim 128 -> rope_theta 5e6, rotary_dim
    64.

    Raises:
        ValueError: one line, for another kind than the default one, and for contradictions.
    """
    rope = _parameters(fields)
    theta, factor = (_agreed(fields, rope, name) for name in ("rope_theta", "partial_rotary_factor"))
    # what is left are fields of other kinds of scaling, such as a factor
    for name, value in rope.items():
        if value is not None:
            raise fields.refusal(f"rope_parameters.{name}", value, "is not implemented here; must be absent")
    return {
        "rope_theta": _ROPE_THETA if theta is None else theta,
        "rotary_dim": _rotary_dim(fields, head_dim, factor),
    }


def _parameters(fields: Fields) -> dict[str, Any]:
    """Take the one object of parameters, without its type; of two, transformers takes rope_scaling."""
    scaling, rope = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    both = bool(scaling and rope)
    for place, values in (("rope_scaling", scaling), ("rope_parameters", rope)):
        for name in ("rope_type", "type"):
            kind = values.pop(name, "default")
            if kind != "default":
                raise fields.refusal(f"{place}.{name}", kind, "is not implemented here; must be default")
    if both and scaling != rope:
        raise fields.refusal(
            "rope_scaling",
            scaling,
            "transformers takes this in place of rope_parameters, which say otherwise; remove the wrong "
            "one, or --ignore-field rope_scaling",
        )
    return rope or scaling


def _agreed(fields: Fields, rope: dict[str, Any], name: str) -> float | None:
    """Take a number of the parameters or beside them; None where it is in neither place."""
    found = []
    for place, values in (("rope_parameters.", rope), ("", fields.left)):
        value = values.pop(name, None)
        found.append(None if value is None else fields.as_number(place + name, value))
    inner, outer = found
    if None not in (inner, outer) and inner != outer:
        raise fields.refusal(name, f"{outer:g}", f"rope_parameters say {inner:g}; correct whichever is wrong")
    return outer if inner is None else inner


def _rotary_dim(fields: Fields, head_dim: int, factor: float | None) -> int:
    """Return the rotated channels of a head; of M3, transformers rotates all without a factor."""
    given = fields.left.pop("rotary_dim", None)
    dim = None if given is None else fields.as_whole("rotary_dim", given)
    # int() cuts like transformers does: a factor that is a hair too small loses a channel
    used = head_dim if factor is None else int(head_dim * factor)
    if factor is None and dim is not None and fields.family is Family.m2:
        used = dim
    if dim is not None and dim != used:
        raise fields.refusal(
            "rotary_dim",
            dim,
            f"transformers rotates {used} of {head_dim} channels (partial_rotary_factor={factor}); correct "
            "whichever is wrong, or --ignore-field rotary_dim",
        )
    return used
