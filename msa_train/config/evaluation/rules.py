"""Check the settings of evaluations. Each failure is one ValueError line: value, rule, fix."""

from msa_train.config.evaluation.settings import (
    EvaluationConfig,
    context_lengths,
    num_last_tokens,
    sample_lengths,
    task_names,
)
from msa_train.config.run import RunConfig
from msa_train.config.stage_plan import longest_seq_len

_MAX_SAMPLES = 100_000


def check_evaluation(config: RunConfig) -> None:
    """Check what an evaluation would do, also where none is due: msa-eval reads the same settings.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    settings, longest = config.evaluation, longest_seq_len(config)
    _check_numbers(settings)
    names = task_names(settings)
    for length in sample_lengths(settings, longest):
        if length > longest:
            raise ValueError(
                f"evaluation.lengths={length}: is longer than the longest pack of the run, {longest} tokens; "
                f"use at most {longest}, or a longer data.seq_len"
            )
    if "qa" in names and not settings.questions.strip():
        raise ValueError(
            "evaluation.tasks=qa: needs the questions of a file; use evaluation.questions=PATH (SQuAD or "
            "HotpotQA), or evaluation.tasks=qa_built"
        )
    last = num_last_tokens(settings, longest)
    if last >= longest:
        raise ValueError(
            f"evaluation.last_tokens={last}: leaves no context in the longest pack, {longest} tokens; use "
            "evaluation.last_tokens=0 for a quarter of it"
        )
    for context in context_lengths(settings, longest):
        if context + last > longest:
            raise ValueError(
                f"evaluation.contexts={context}: does not fit with the last {last} tokens into a pack of "
                f"{longest}; use at most {max(longest - last, 1)}, or fewer evaluation.last_tokens"
            )
    if settings.held_out_packs and not config.data.validation_fraction:
        raise ValueError(
            f"evaluation.held_out_packs={settings.held_out_packs}: no document is held out with "
            "data.validation_fraction=0; use evaluation.held_out_packs=0 or a larger fraction"
        )
    if settings.every and not (names or settings.held_out_packs):
        raise ValueError(
            f"evaluation.every={settings.every}: there is nothing to evaluate; use "
            "evaluation.tasks=niah_single_2, evaluation.held_out_packs=4, or evaluation.every=0"
        )


def _check_numbers(settings: EvaluationConfig) -> None:
    for name in ("every", "held_out_packs", "last_tokens", "seed"):
        value = getattr(settings, name)
        if value < 0:
            raise ValueError(f"evaluation.{name}={value}: must not be negative; use evaluation.{name}=0")
    for name in ("samples", "depths"):
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"evaluation.{name}={value}: must be at least 1; use evaluation.{name}=10")
    if settings.samples > _MAX_SAMPLES:
        raise ValueError(
            f"evaluation.samples={settings.samples}: must be at most {_MAX_SAMPLES}; 100 tell a share to "
            "within 10 points"
        )
