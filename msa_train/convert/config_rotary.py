"""Read and write the rotary embedding in a config.json: said in up to three places, which must agree."""

from typing import Any

from msa_train.config import ModelConfig, RopeType, rope_of_model
from msa_train.convert.config_fields import Family, Fields

_ROPE_THETA = 5000000.0
_PLACES = ("rope_scaling", "rope_parameters")
_TYPES = ("rope_type", "type")
"the type's spelling today, and the older one"
_KINDS = ("default", "linear", "yarn")
_ORIGINAL = "original_max_position_embeddings"
_OF_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_SCALING = ("factor", _ORIGINAL, *_OF_YARN, "truncate")


def read_rotary(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Read settings of ModelConfig from rope_parameters, rope_scaling (its older name) and fields beside.

    Types default, linear and yarn are read. `dynamic` (ntk) is not supported: its frequencies follow the
    length of each input, and ours, `ntk`, have one factor.

    Example: {"rope_theta": 5e6, "partial_rotary_factor": 0.5} and head_dim 128 -> rope_theta 5e6, rotary_dim
    64.

    Raises:
        ValueError: one line, for another kind of scaling, and for contradictions.
    """
    place, rope = _parameters(fields)
    theta, factor = (_agreed(fields, rope, name) for name in ("rope_theta", "partial_rotary_factor"))
    scaling = _scaling(fields, place, rope)
    # what is left are fields of other kinds of scaling
    for name, value in rope.items():
        if value is not None:
            raise fields.refusal(f"{place}.{name}", value, "is not implemented here; must be absent")
    return {
        "rope_theta": _ROPE_THETA if theta is None else theta,
        "rotary_dim": _rotary_dim(fields, head_dim, factor),
        **scaling,
    }


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Write theta and scaling as rope_parameters have them, without partial_rotary_factor.

    ntk is written as what it is: type default with the larger theta.
    """
    rope = rope_of_model(model)
    kind = RopeType.default if rope.type is RopeType.ntk else rope.type
    result: dict[str, Any] = {"rope_type": kind.value, "rope_theta": rope.base(model.rotary_dim)}
    if kind is not RopeType.default:
        result["factor"] = rope.factor
    if kind is RopeType.yarn:
        result["original_max_position_embeddings"] = rope.original_length
        # what is 0 here is derived there, and the other way round
        given = {name: getattr(model, f"rope_{name}") for name in _OF_YARN}
        result |= {name: value for name, value in given.items() if value}
        if not rope.truncate:
            result["truncate"] = False
    return result


def extend_rotary(text: dict[str, Any], model: ModelConfig) -> None:
    """Change theta and scaling in a config.json, in whichever places and spellings it has them.

    Args:
        text: the object of the language model; changed in place.
        model: our configuration after an extension.
    """
    wanted = write_rotary(model)
    theta, kind = wanted.pop("rope_theta"), wanted.pop("rope_type")
    places = [text[name] for name in _PLACES if isinstance(text.get(name), dict) and text[name]]
    for place in (text, *places):
        if place.get("rope_theta") is not None and place["rope_theta"] != theta:
            place["rope_theta"] = theta
    if not places and kind != RopeType.default.value:
        # as released: theta beside it; servers read this name
        text["rope_scaling"] = {}
        places = [text["rope_scaling"]]
    for place in places:
        has_changed = kind != place.get("rope_type", place.get("type", "default"))
        if has_changed:
            for name in [name for name in _TYPES if name in place] or _TYPES[:1]:
                place[name] = kind
        # what is not said means the same as this
        unsaid = {"truncate": True} if kind == RopeType.yarn.value else {}
        for name in _SCALING:
            value = wanted.get(name)
            if place.get(name, unsaid.get(name)) == (unsaid.get(name) if value is None else value):
                continue
            place.pop(name, None)
            if value is not None:
                place[name] = value
        if has_changed and place is text.get("rope_scaling") and set(place.values()) == {"default"}:
            del text["rope_scaling"]


def _parameters(fields: Fields) -> tuple[str, dict[str, Any]]:
    """Take the one object of parameters and its name; of two, transformers takes rope_scaling."""
    found: dict[str, dict[str, Any]] = {}
    for place in _PLACES:
        values = fields.mapping(place)
        for name in _TYPES:
            kind = values.get(name, "default")
            if kind == "dynamic":
                raise fields.refusal(
                    f"{place}.{name}",
                    kind,
                    "is not supported, as its frequencies follow the length of each input; write default "
                    "with the rope_theta of one length, rope_theta * factor^(d / (d - 2))",
                )
            if kind not in _KINDS:
                raise fields.refusal(
                    f"{place}.{name}", kind, f"is not implemented here; must be {' or '.join(_KINDS)}"
                )
        if values:
            kinds = [values.pop(name) for name in _TYPES if name in values] or ["default"]
            if len(set(kinds)) > 1:
                raise fields.refusal(f"{place}.type", kinds[1], f"rope_type says {kinds[0]}; remove one")
            found[place] = {"rope_type": kinds[0], **values}
    scaling, rope = (found.get(place) for place in _PLACES)
    if scaling and rope and scaling != rope:
        raise fields.refusal(
            "rope_scaling",
            scaling,
            "transformers takes this in place of rope_parameters, which say otherwise; remove the wrong "
            "one, or --ignore-field rope_scaling",
        )
    return _PLACES[0 if scaling else 1], rope or scaling or {}


def _scaling(fields: Fields, place: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Take type, factor and what yarn has besides from the parameters; nothing for type default."""
    kind = RopeType(rope.pop("rope_type", "default"))
    if kind is RopeType.default:
        return {}
    given = {name: value for name in _SCALING if (value := rope.pop(name, None)) is not None}
    result: dict[str, Any] = {"rope_type": kind}
    if kind is RopeType.yarn:
        beside = fields.left.pop(_ORIGINAL, None)
        original = given.pop(_ORIGINAL, beside)
        # transformers lets the field beside it win
        if beside not in (None, original):
            raise fields.refusal(_ORIGINAL, beside, f"{place} say {original}; correct whichever is wrong")
        name = f"{place}.{_ORIGINAL}"
        result["rope_original_length"] = fields.as_whole(
            name, fields.max_positions if original is None else original
        )
        if "factor" not in given and fields.max_positions is not None:
            whole = fields.as_whole("max_position_embeddings", fields.max_positions)
            given["factor"] = whole / result["rope_original_length"]
        truncate = given.pop("truncate", True)
        if not isinstance(truncate, bool):
            raise fields.refusal(f"{place}.truncate", truncate, "must be true or false")
        result["rope_truncate"] = truncate
        result |= {
            f"rope_{name}": fields.as_number(f"{place}.{name}", given.pop(name))
            for name in _OF_YARN
            if name in given
        }
    factor = fields.as_number(f"{place}.factor", given.pop("factor", None))
    if factor < 1:
        raise fields.refusal(f"{place}.factor", factor, "must be at least 1")
    for name, value in given.items():
        raise fields.refusal(f"{place}.{name}", value, f"has no effect with {kind.value}; must be absent")
    return result | {"rope_factor": factor}


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
