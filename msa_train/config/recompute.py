"""Resolve what each pipeline rank computes again in the backward pass."""

from msa_train.config.options import Recompute
from msa_train.config.run import RunConfig

MODULES = ("attention", "experts", "ffn", "norm")
"parts of a layer that train.recompute=selective can name"


def recompute_modules(config: RunConfig) -> frozenset[str]:
    """Read train.recompute_modules: "experts, norm" -> {"experts", "norm"}; rules check the names."""
    parts = (part.strip() for part in config.train.recompute_modules.split(","))
    return frozenset(part for part in parts if part)


def stage_recomputes(config: RunConfig) -> tuple[Recompute, ...]:
    """Return the recomputation of each pipeline rank: train.recompute, or what recompute_stages says.

    Example: pp_size 4, recompute_stages "full,selective,none,none" -> full, selective, none, none.

    Raises:
        ValueError: for a word that is none of the choices.
    """
    text = config.train.recompute_stages
    if not text.strip():
        return (config.train.recompute,) * config.parallel.pp_size
    return tuple(Recompute(part.strip()) for part in text.split(","))


def replays_attention(config: RunConfig) -> float:
    """Return the share of pipeline ranks whose attention, exchange included, runs twice: from 0 to 1."""
    return recomputed_share(config, "attention")


def recomputed_share(config: RunConfig, part: str) -> float:
    """Return the share of pipeline ranks that compute a part of a layer twice: from 0 to 1.

    Args:
        config: of the run.
        part: of MODULES; another word stands for what only `full` computes again.

    Example: recompute_stages "full,selective,none,none", modules "experts" -> experts 0.5, attention 0.25.
    """
    named = part in recompute_modules(config)
    kinds = stage_recomputes(config)
    twice = [kind is Recompute.full or (kind is Recompute.selective and named) for kind in kinds]
    return sum(twice) / len(twice)
