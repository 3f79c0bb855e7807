"""Check what is recomputed and offloaded."""

from msa_train.config.options import Implementation, Recompute
from msa_train.config.recompute import MODULES, recompute_modules, stage_recomputes
from msa_train.config.run import RunConfig


def check_recompute(config: RunConfig) -> None:
    """Check train.recompute_stages and train.recompute_modules.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    train, pp_size = config.train, config.parallel.pp_size
    stages = f"train.recompute_stages={train.recompute_stages}"
    try:
        kinds = stage_recomputes(config)
    except ValueError:
        choices = ", ".join(kind.value for kind in Recompute)
        raise ValueError(
            f"{stages}: must be words out of {choices}, one for each pipeline rank; use "
            f"train.recompute_stages={','.join([train.recompute.value] * pp_size)}, or leave it empty"
        ) from None
    if len(kinds) != pp_size:
        raise ValueError(
            f"{stages}: has {len(kinds)} words for parallel.pp_size={pp_size} pipeline ranks; use one for "
            "each, or leave it empty"
        )
    modules = recompute_modules(config)
    named = f"train.recompute_modules={train.recompute_modules}"
    if unknown := sorted(modules - set(MODULES)):
        raise ValueError(f"{named}: '{unknown[0]}' is not one of {', '.join(MODULES)}; use some of these")
    if Recompute.selective in kinds and "norm" in modules:
        _refuse_norms(config, named)
    if Recompute.selective in kinds and not modules:
        raise ValueError(
            f"{named}: names nothing for train.recompute=selective; use "
            "train.recompute_modules=experts,ffn,norm or train.recompute=none"
        )


def _refuse_norms(config: RunConfig, named: str) -> None:
    if config.model.implementation is Implementation.transformer_engine:
        raise ValueError(
            f"{named}: model.implementation=transformer_engine has norms of its own, which keep their "
            "outputs; leave norm out, or use model.implementation=torch"
        )
