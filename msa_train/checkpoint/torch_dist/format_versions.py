"""Find the sharded state of older formats; define what meta.json's format_version stands for.

1   engine=torch stored the fp32 weights as optimizer.state.fp32_param.*, engine=megatron as
    optimizer.state.param.* beside Megatron's own groups of parameters in the common data
2   both engines: optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.NAME, cut as the model's parameter NAME is,
    and nothing else of the optimizer; how often it was stepped stands in meta.json
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata

from msa_train.checkpoint.torch_dist.safe_pickles import read_metadata

# Of one parameter, in the order that engines list them
STATE_NAMES = ("fp32_param", "exp_avg", "exp_avg_sq")
STATE_PREFIX = "optimizer.state"
_OLD_WEIGHTS, _WEIGHTS = f"{STATE_PREFIX}.param.", f"{STATE_PREFIX}.fp32_param."


def optimizer_updates(meta: dict[str, Any]) -> int:
    """Return the updates that the optimizer of a checkpoint has made; format 1 knows no steps without one.

    Example: {"step": 100, "optimizer_updates": 97} -> 97, three steps were left out; {"step": 100} -> 100.
    """
    return meta.get("optimizer_updates", meta["step"])


def match_format(template: dict[str, Any], path: Path, format_version: int) -> dict[str, Any]:
    """Give a template the keys under which an older format stored its tensors.

    Args:
        template: sharded state of this version; not changed.
        path: the checkpoint.
        format_version: of its meta.json.

    Returns:
        The template, or a copy with other keys.

    Raises:
        ValueError: one line, if `.metadata` is not of a checkpoint.
    """
    if format_version > 1:
        return template
    # format 1 of engine=torch had the present keys already
    metadata: Metadata = read_metadata(path)
    if not any(key.startswith(_OLD_WEIGHTS) for key in metadata.state_dict_metadata):
        return template
    return rename_keys(template, _WEIGHTS, _OLD_WEIGHTS)


def current_key(key: str) -> str:
    """Return the name under which the present format stores a tensor of any format.

    Example: optimizer.state.param.w -> optimizer.state.fp32_param.w; others as they are.
    """
    return _WEIGHTS + key.removeprefix(_OLD_WEIGHTS) if key.startswith(_OLD_WEIGHTS) else key


def rename_keys(template: dict[str, Any], begin: str, new_begin: str) -> dict[str, Any]:
    """Copy a template; sharded tensors whose key starts with `begin` get one that starts with `new_begin`."""

    def rename(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.key.startswith(begin):
            return replace(entry, key=new_begin + entry.key.removeprefix(begin))
        return entry

    # it works in place, and the caller's template stays as it is
    renamed: Any = dict_list_map_inplace(rename, _copied(template))
    return renamed


def _copied(tree: Any) -> Any:
    """Copy dicts and lists, but not what they hold."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree
