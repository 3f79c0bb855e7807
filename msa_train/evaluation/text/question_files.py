"""Read questions with documents from a user's file, in the JSON of SQuAD v2 or HotpotQA."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from msa_train.runtime.untrusted_files import parse_json, read_limited

_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Question:
    """Hold one question."""

    text: str
    "the question"
    answer: str
    "the first of its answers"
    gold: tuple[str, ...]
    "documents that hold the answer"
    near: tuple[str, ...]
    "documents that come first among the others, as of the same article"
    source: str
    "squad or hotpot, with the file's digest"


@cache
def load_questions(path: str) -> tuple[Question, ...]:
    """Read a file; no path, no questions.

    Memory: some 50 MB for SQuAD's or HotpotQA's development set, documents shared between questions.

    Raises:
        ValueError: if it cannot be read, or is neither format.
    """
    if not path:
        return ()
    try:
        content = read_limited(Path(path).expanduser(), _MAX_BYTES)
        value = parse_json(content)
        digest = hashlib.sha256(content).hexdigest()[:16]
        read = _squad if isinstance(value, dict) else _hotpot
        questions = tuple(read(value, digest))
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _refused(path, "is not of the form of SQuAD or HotpotQA") from error
    if not questions:
        raise _refused(path, "has no question with an answer")
    return questions


def documents_of(questions: tuple[Question, ...]) -> list[str]:
    """List all documents, each once, in the file's order."""
    return list(dict.fromkeys(text for one in questions for text in (*one.gold, *one.near)))


def _refused(path: str, reason: str) -> ValueError:
    return ValueError(
        f"evaluation.questions={path}: {reason}; give the JSON file of SQuAD v2 or of HotpotQA (distractor)"
    )


def _squad(value: Any, digest: str) -> Iterator[Question]:
    for article in value["data"]:
        contexts = [str(paragraph["context"]) for paragraph in article["paragraphs"]]
        for number, paragraph in enumerate(article["paragraphs"]):
            near = tuple(contexts[:number] + contexts[number + 1 :])
            for question in paragraph["qas"]:
                if question.get("is_impossible") or not question["answers"]:
                    continue
                answer = str(question["answers"][0]["text"])
                gold = (contexts[number],)
                yield Question(str(question["question"]), answer, gold, near, f"squad sha256:{digest}")


def _hotpot(value: Any, digest: str) -> Iterator[Question]:
    for record in value:
        documents = {str(title): f"{title}\n{''.join(map(str, lines))}" for title, lines in record["context"]}
        titles = {str(title) for title, _ in record["supporting_facts"]}
        gold = tuple(text for title, text in documents.items() if title in titles)
        near = tuple(text for title, text in documents.items() if title not in titles)
        if gold:
            yield Question(
                str(record["question"]), str(record["answer"]), gold, near, f"hotpot sha256:{digest}"
            )
