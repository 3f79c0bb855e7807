"""Check `parallel.pp_layout`. Each failure is one ValueError line: the value, the rule, the fix."""

from msa_train.config.pipeline.layout import AUTO, EVEN, num_microbatches, parse_numbers
from msa_train.config.run import RunConfig


def check_pipeline(config: RunConfig) -> None:
    """Check that the layers can be cut as it says.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    model, pp_size, text = config.model, config.parallel.pp_size, config.parallel.pp_layout.strip()
    numbers = parse_numbers(text)
    if numbers is not None:
        _check_numbers(text, numbers, model.num_layers, pp_size)
        return
    if text not in (EVEN, AUTO):
        raise ValueError(
            f"parallel.pp_layout={text}: must be even, auto, or layers per stage such as "
            f"{','.join(['15'] * 4)}; use parallel.pp_layout=auto"
        )
    if text == EVEN and model.num_layers % pp_size:
        raise ValueError(
            f"parallel.pp_size={pp_size}: must divide model.num_layers={model.num_layers} with "
            "parallel.pp_layout=even; use another size, or parallel.pp_layout=auto"
        )
    if pp_size > model.num_layers:
        raise ValueError(
            f"parallel.pp_size={pp_size}: must be at most model.num_layers={model.num_layers}; use "
            f"parallel.pp_size={model.num_layers}"
        )


def check_interleaving(config: RunConfig, world_size: int) -> None:
    """Check that an interleaved pipeline gets as many packs per step as it needs. After the sizes.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    parallel = config.parallel
    numbers, packs = parse_numbers(parallel.pp_layout.strip()), num_microbatches(config, world_size)
    if numbers is None or len(numbers) == parallel.pp_size or packs % parallel.pp_size == 0:
        return
    dp_size = world_size // (parallel.tp_size * parallel.pp_size * parallel.cp_size)
    unit = dp_size * parallel.pp_size
    batch = config.train.global_batch_size
    raise ValueError(
        f"train.global_batch_size={batch}: an interleaved pipeline needs a multiple of the data-parallel "
        f"size {dp_size} * parallel.pp_size {parallel.pp_size} = {unit}; use "
        f"train.global_batch_size={-(-batch // unit) * unit}, or {parallel.pp_size} numbers in "
        "parallel.pp_layout"
    )


def _check_numbers(text: str, numbers: tuple[int, ...], num_layers: int, pp_size: int) -> None:
    if len(numbers) % pp_size or (pp_size == 1 and len(numbers) > 1):
        fix = f"use {pp_size} numbers" if pp_size > 1 else "use parallel.pp_layout=even"
        raise ValueError(
            f"parallel.pp_layout={text}: must have a number for each of the parallel.pp_size={pp_size} "
            f"ranks, or as many again for each further chunk, and has {len(numbers)}; {fix}"
        )
    if 0 in numbers:
        raise ValueError(f"parallel.pp_layout={text}: every chunk must have a layer; use numbers from 1 on")
    if sum(numbers) != num_layers:
        raise ValueError(
            f"parallel.pp_layout={text}: must add up to model.num_layers={num_layers}, and is "
            f"{sum(numbers)}; correct it, or use parallel.pp_layout=auto"
        )
