"""Name the tasks."""

from collections.abc import Callable

from msa_train.evaluation.tasks.conversations import CONVERSATION_TASKS
from msa_train.evaluation.tasks.needles import NEEDLE_TASKS, NoOverlapTask
from msa_train.evaluation.tasks.questions import BuiltQuestionTask, FileQuestionTask
from msa_train.evaluation.tasks.sample import Draft, Draw
from msa_train.evaluation.tasks.variables import VariableTask
from msa_train.evaluation.tasks.words import CommonWordsTask, FrequentWordsTask
from msa_train.evaluation.tasks.worlds import WORLD_TASKS

TASKS: dict[str, Callable[[Draw], Draft]] = {
    **NEEDLE_TASKS,
    "niah_no_overlap": NoOverlapTask(),
    "vt": VariableTask(),
    "cwe": CommonWordsTask(),
    "fwe": FrequentWordsTask(),
    "qa": FileQuestionTask(),
    "qa_built": BuiltQuestionTask(),
    **WORLD_TASKS,
    **CONVERSATION_TASKS,
}


def nominal_depth(index: int, num_depths: int) -> float:
    """Return the depth that a sample's needle is put at: even depths from 0 to 1, one after another.

    Example: 3 depths -> 0, 0.5, 1, 0, ...; a single one is the middle.
    """
    return index % num_depths / (num_depths - 1) if num_depths > 1 else 0.5
