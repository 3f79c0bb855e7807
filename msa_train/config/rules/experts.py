"""Check how experts and feed-forward layers run: tiles."""

from msa_train.config.run import RunConfig


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
