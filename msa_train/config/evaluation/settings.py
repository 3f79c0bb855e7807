"""Describe what is evaluated, when, and with what texts."""

import fnmatch
from dataclasses import dataclass

NEEDLE_NAMES = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)
# every task; `msa_train.evaluation.tasks.registry` has a generator for each
TASK_NAMES = (
    *NEEDLE_NAMES,
    "niah_no_overlap",
    "vt",
    "cwe",
    "fwe",
    "qa",
    "qa_built",
    *(f"babi_qa{number}" for number in range(1, 6)),
    *(f"mrcr_built_{count}" for count in (2, 4, 8)),
)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Say what is evaluated; every figure is of the same samples at each step."""

    every: int = 0
    "steps between evaluations in training, with one more at the end of each stage; 0: none"
    tasks: str = "niah_single_2"
    "comma-separated names or patterns as niah_*; empty: none. qa needs evaluation.questions"
    lengths: str = ""
    "tokens of a sample, answer included, comma-separated; empty: the run's longest pack"
    samples: int = 10
    "of each task and length"
    depths: int = 5
    "even depths from 0 to 1 that single needles are put at, one sample after another"
    seed: int = 4321
    "of the samples"
    selections: bool = True
    "measure how often MSA layers select the blocks that hold a needle, by layer and KV head"
    held_out_packs: int = 0
    "held-out packs whose loss is told by log2 of the position, and with more and less context; 0: none"
    contexts: str = "auto"
    "tokens before the last ones, whose loss is compared, comma-separated; auto: 1/8 to all; empty: none"
    last_tokens: int = 0
    "tokens whose loss with more and less context is compared; 0: 4096, at most a quarter of the pack"
    haystack: str = ""
    "text file to hide needles in; empty: sentences are built"
    questions: str = ""
    "JSON file of SQuAD v2 or HotpotQA, for the task qa"
    templates: str = ""
    "clone of NVIDIA/RULER whose wording is used, parsed and never executed; empty: our own wording"


def task_names(settings: EvaluationConfig) -> tuple[str, ...]:
    """List the tasks that are asked for, in the order of TASK_NAMES, each once.

    Example: "vt, niah_multi*" -> multikey_1 to _3, multivalue, multiquery, vt.

    Raises:
        ValueError: for a name that fits none.
    """
    wanted: set[str] = set()
    for pattern in _split(settings.tasks):
        found = fnmatch.filter(TASK_NAMES, pattern)
        # a pattern does not mean the task that needs a file, unless there is one
        found = [name for name in found if name != "qa" or settings.questions or pattern == "qa"]
        if not found:
            raise ValueError(
                f"evaluation.tasks={pattern}: there is no such task; use some of {', '.join(TASK_NAMES)}"
            )
        wanted.update(found)
    return tuple(name for name in TASK_NAMES if name in wanted)


def sample_lengths(settings: EvaluationConfig, longest: int) -> tuple[int, ...]:
    """List the lengths of samples, ascending, each once; `longest` where none is written.

    Example: "8K, 4096" -> 4096, 8192.

    Raises:
        ValueError: for what is no number of tokens.
    """
    return tuple(sorted({_tokens("lengths", text) for text in _split(settings.lengths)} or {longest}))


def context_lengths(settings: EvaluationConfig, pack_tokens: int) -> tuple[int, ...]:
    """List the tokens before the last ones that are compared, ascending; none where it is not asked for.

    Example: "auto" in packs of 8,192 tokens, of which the last 2,048 are compared: 768, 1536, 3072, 6144.

    Raises:
        ValueError: for what is no number of tokens.
    """
    if settings.contexts.strip() == "auto":
        all_before = pack_tokens - num_last_tokens(settings, pack_tokens)
        return tuple(sorted({max(all_before >> shift, 1) for shift in range(4)}))
    return tuple(sorted({_tokens("contexts", text) for text in _split(settings.contexts)}))


def num_last_tokens(settings: EvaluationConfig, pack_tokens: int) -> int:
    """Return the tokens whose loss with more and less context is compared."""
    return settings.last_tokens or max(min(4096, pack_tokens // 4), 1)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _tokens(name: str, text: str) -> int:
    """Read a number of tokens: "4096", "128K", "1M"."""
    unit = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    # isdecimal alone takes digits of other scripts
    if not (digits.isascii() and digits.isdecimal() and int(digits[:12]) > 0 and len(digits) <= 12):
        raise ValueError(
            f"evaluation.{name}={text}: must be positive numbers of tokens with commas between, "
            f"such as 4096,128K"
        )
    return int(digits) * unit
