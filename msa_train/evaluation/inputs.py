"""Load what samples are written with, as the settings say."""

from collections.abc import Callable

from msa_train.config import EvaluationConfig, RunConfig, longest_seq_len
from msa_train.config.evaluation.settings import sample_lengths, task_names
from msa_train.data.tokenizers.tokenizer import build_tokenizer
from msa_train.evaluation.tasks.registry import TASKS, nominal_depth
from msa_train.evaluation.tasks.sample import Sample, TokenCounts, TooShortError, build_sample
from msa_train.evaluation.text.haystacks import load_sentences
from msa_train.evaluation.text.material import Material
from msa_train.evaluation.text.question_files import load_questions
from msa_train.evaluation.text.ruler_definitions import load_wording
from msa_train.evaluation.text.word_lists import load_word_lists

_MOST_TRIED = 1 << 16


def load_material(settings: EvaluationConfig) -> tuple[Material, list[str]]:
    """Load words, haystack, wording and questions; every rank does, from files that all of them see.

    Returns:
        The material, and a line for each library that is not installed and was wanted.

    Raises:
        ValueError: if a file of the user's cannot be used.
    """
    words, sentences = load_word_lists(), load_sentences(settings.haystack)
    questions = load_questions(settings.questions)
    material = Material(words, sentences, load_wording(settings.templates), questions)
    wants_words = any(name.startswith(("niah", "cwe")) for name in task_names(settings))
    return material, [hint for hint in (words.hint if wants_words else "", sentences.hint) if hint]


def make_sample(
    settings: EvaluationConfig, material: Material, counts: TokenCounts, task: str, length: int, index: int
) -> Sample:
    """Make one sample, the same wherever it is made.

    Raises:
        ValueError: if the length is too short for the task.
    """
    try:
        return build_sample(
            task,
            TASKS[task],
            seed=settings.seed,
            index=index,
            length=length,
            depth=nominal_depth(index, settings.depths),
            counts=counts,
            material=material,
        )
    except TooShortError as error:
        raise ValueError(
            f"evaluation.lengths={length}: is too short for {task}, which {error}; use a longer one, or "
            "leave the task out of evaluation.tasks"
        ) from error


def check_inputs(config: RunConfig, say: Callable[[str], None]) -> None:
    """Load everything and make the first sample of each task at the shortest length, before anything starts.

    What fits there fits longer ones. At most 64K tokens are made, some 0.5 s for each task.

    Args:
        config: of the run.
        say: gets a line for each library that is not installed.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    settings, tokenizer = config.evaluation, build_tokenizer(config.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer}: has {tokenizer.vocab_size} words and model.vocab_size="
            f"{config.model.vocab_size}; evaluations write text with it, so use the corpus' own tokenizer"
        )
    material, hints = load_material(settings)
    for hint in hints:
        say(hint)
    shortest = min(sample_lengths(settings, longest_seq_len(config)))
    counts = TokenCounts(tokenizer)
    for task in task_names(settings):
        make_sample(settings, material, counts, task, min(shortest, _MOST_TRIED), 0)
