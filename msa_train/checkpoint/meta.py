"""Check meta.json of a checkpoint: what must be there, and of which kind it is. Standard library only.

Whoever reads a value later relies on its kind: a count that is a text would end a resume of 256 ranks with a
traceback and no word of the file.
"""

from collections.abc import Mapping
from typing import Any

# see torch_dist/format_versions.py
FORMAT_VERSION = 2
META_NAME = "meta.json"

_NUMBER = (int, float)
_NEEDED: dict[str, tuple[type, ...]] = {"step": (int,), "consumed_samples": (int,), "fingerprint": (dict,)}
# absent where another program or an older version wrote it
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "ends_stage": (bool,),
    **dict.fromkeys(("world_size", "tokens", "optimizer_updates"), (int,)),
    **dict.fromkeys(("layout", "bad_steps", "data", "schedule"), (dict,)),
    **dict.fromkeys(("engine", "optimizer", "precision", "content", "msa_train_version"), (str,)),
    "megatron_core_version": (str,),
    "stages": (list,),
}
_PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "layout": {f"{name}_size": (int,) for name in ("dp", "cp", "ep", "tp", "pp")},
    "bad_steps": {
        **dict.fromkeys(("in_a_row", "skipped", "passed_over_tokens"), (int,)),
        **dict.fromkeys(("rollbacks", "recent_losses"), (list,)),
    },
    "data": {"since_step": (int,), "before": (list,)},
}
"kinds of values in those parts, each of which may be absent"
# parts that are whole or not there
_NEEDED_PARTS: dict[str, dict[str, tuple[type, ...]]] = {"schedule": {"steps": (int,), "next_lr": _NUMBER}}
_STAGE: dict[str, tuple[type, ...]] = {"name": (str,), "first_step": (int,), "num_steps": (int,)}


def meta_damage(meta: dict[str, Any], step: int | None) -> str | None:
    """Check meta.json for what is absent or of another kind; nothing is asked of newer formats.

    Example: {"format_version": 2, "step": "100"} -> "meta.json: has no step".

    Args:
        meta: its content.
        step: of which the folder's name is; None for other names.

    Returns:
        One line, None if it is sound.
    """
    version = meta.get("format_version")
    if type(version) is not int or version < 1:
        return f"{META_NAME}: has no format_version"
    if version > FORMAT_VERSION:
        return None
    for name, kinds in _NEEDED.items():
        if type(meta.get(name)) not in kinds:
            return f"{META_NAME}: has no {name}"
    if not meta["fingerprint"]:
        return f"{META_NAME}: fingerprint is empty"
    if not _counts_agree(meta):
        return f"{META_NAME}: the counts of steps, updates and samples are damaged"
    for name, kinds in _OPTIONAL.items():
        if name in meta and not (_is_one(meta[name], kinds) and _is_sound(name, meta[name])):
            return f"{META_NAME}: {name} is damaged"
    if step not in (None, meta["step"]):
        return f"{META_NAME}: is of step {meta['step']}"
    return None


def _counts_agree(meta: dict[str, Any]) -> bool:
    """Tell whether updates are no more than steps, and no sample was used before the first step."""
    step, samples, updates = meta["step"], meta["consumed_samples"], meta.get("optimizer_updates", 0)
    if type(updates) is not int or not 0 <= updates <= step:
        return False
    return samples >= 0 and (step > 0 or samples == 0)


def _is_sound(name: str, value: Any) -> bool:
    """Look into one optional value, whose own kind is right."""
    if isinstance(value, str):
        # it is printed
        return value.isprintable()
    if name == "stages":
        return all(
            isinstance(stage, dict) and _has_all(stage, _STAGE) and type(stage.get("rope", {})) is dict
            for stage in value
        )
    if name == "bad_steps":
        losses, rollbacks = value.get("recent_losses", []), value.get("rollbacks", [])
        if not (isinstance(losses, list) and all(type(loss) in _NUMBER for loss in losses)):
            return False
        if not (isinstance(rollbacks, list) and all(isinstance(one, dict) for one in rollbacks)):
            return False
    if name in _NEEDED_PARTS:
        return _has_all(value, _NEEDED_PARTS[name])
    kinds = _PARTS.get(name, {})
    return isinstance(value, int) or all(
        _is_one(entry, kinds[key]) for key, entry in value.items() if key in kinds
    )


def _has_all(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> bool:
    """Tell whether all of these keys are there and of their kinds."""
    return all(_is_one(values.get(key), allowed) for key, allowed in kinds.items())


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether a value is of these kinds; True is no number, and no count is negative."""
    return type(value) in kinds and not (type(value) in _NUMBER and value < 0)
