"""Collect what samples are written with, and say what it is, for the results."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msa_train.evaluation.text.haystacks import Sentences
from msa_train.evaluation.text.word_lists import WordLists
from msa_train.evaluation.text.wording import Wording

if TYPE_CHECKING:
    from msa_train.evaluation.text.question_files import Question


@dataclass(frozen=True, slots=True)
class Material:
    """Hold words, running text, wording and questions."""

    words: WordLists
    "words by kind"
    sentences: Sentences
    "running text, sentence by sentence"
    wording: Wording
    "frames of the tasks"
    questions: "tuple[Question, ...]" = field(default=())
    "of a file of the user's; none: qa cannot be asked for"

    def names(self) -> dict[str, str]:
        """Say what it is made of, for each row of the results."""
        return {
            "wording": self.wording.name,
            "words": self.words.name,
            "haystack": self.sentences.name,
            "wording_digest": self.wording.digest,
            "questions": self.questions[0].source if self.questions else "",
        }
