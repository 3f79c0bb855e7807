"""Check how experts and feed-forward layers run: tiles, and how their rows travel."""

from msa_train.config.options import MoeDispatcher, Precision
from msa_train.config.run import RunConfig

# numbers of ranks that every version of DeepEP has settings for
_DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
# DeepEP copies 16 bytes at a time: 8 numbers of a bf16 row
_DEEPEP_COLUMNS = 8


def check_expert_tiles(config: RunConfig) -> None:
    """Check train.tile_tokens.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    tile_tokens = config.train.tile_tokens
    if tile_tokens < 0:
        raise ValueError(
            f"train.tile_tokens={tile_tokens}: must not be negative; use 0 for no tiles, or 2048 for M3"
        )


def check_dispatcher(config: RunConfig) -> None:
    """Check what parallel.moe_dispatcher=deepep can run with; whether it is there, the launcher checks.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if config.parallel.moe_dispatcher is not MoeDispatcher.deepep:
        return
    ep_size, width = config.parallel.ep_size, config.model.hidden_size
    sizes = ", ".join(map(str, _DEEPEP_RANKS))
    reason = ""
    if ep_size == 1:
        reason = "sends rows between ranks, and parallel.ep_size=1 is one; use a larger parallel.ep_size"
    elif ep_size not in _DEEPEP_RANKS:
        reason = f"has no settings for parallel.ep_size={ep_size}; use one of {sizes}"
    elif config.train.precision is not Precision.bf16:
        reason = (
            f"sends rows of bf16 alone, not of train.precision={config.train.precision.value}; "
            "use train.precision=bf16"
        )
    elif config.train.deterministic:
        reason = (
            "does not promise the same bits in every run, as train.deterministic=true does; "
            "use train.deterministic=false"
        )
    elif width % _DEEPEP_COLUMNS:
        reason = (
            f"copies {_DEEPEP_COLUMNS} numbers at a time, and model.hidden_size={width} is no multiple; "
            f"use model.hidden_size={width + -width % _DEEPEP_COLUMNS}"
        )
    if reason:
        raise ValueError(f"parallel.moe_dispatcher=deepep: {reason}, or parallel.moe_dispatcher=alltoall")
