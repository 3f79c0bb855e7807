"""Write documents like the evaluation's samples, for training: the same kinds of text, other seeds.

What a model was trained on in this way it can do here for having seen the form. So a run that trains on them
says what it learned about *length* by tasks that it was not trained on, and `tokens_by_making` says how much
of its data is of this kind.

Cost: 5 to 8 s of a core for a document of 1M tokens, most of it tokenization; processes share the work.
A billion tokens take two hours of a core, by arithmetic; documents leave one by one, so memory does not grow.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

from msa_train.config import DataConfig
from msa_train.config.evaluation.settings import EvaluationConfig
from msa_train.data.long_documents.write import LongDocument
from msa_train.data.tokenizers.tokenizer import build_tokenizer
from msa_train.evaluation.inputs import load_material
from msa_train.evaluation.tasks.recall import RecallTask
from msa_train.evaluation.tasks.registry import TASKS
from msa_train.evaluation.tasks.sample import Draft, Draw, TokenCounts, TooShortError, build_sample
from msa_train.evaluation.text.material import Material

_TRIES = 16

TRAINING_TASKS: dict[str, Callable[[Draw], Draft]] = {"recall": RecallTask(), **TASKS}
"what documents can be made of; recall is for training alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRequest:
    """Say which documents are made."""

    tasks: tuple[str, ...]
    "keys of TRAINING_TASKS; each document is of one of them, drawn evenly"
    lengths: tuple[int, ...]
    "tokens; each document has about one of them, with equal numbers of documents"
    documents: int
    "how many"
    seed: int = 0
    "of the documents; no evaluation shares its samples with any of them"
    tokenizer: str = "bytes"
    "that lengths are counted with"
    haystack: str = ""
    "text file whose sentences are used; empty: they are built"
    processes: int = 1
    "that write at the same time; the documents are the same for any number"


def write_documents(request: DocumentRequest) -> Iterator[LongDocument]:
    """Yield the documents in order.

    Raises:
        ValueError: one line naming what is wrong.
    """
    _check(request)
    numbers = range(request.documents)
    if request.processes == 1:
        yield from (_write_one(request, number) for number in numbers)
        return
    # a fresh interpreter each: what this process has imported and started stays out of it
    pool = ProcessPoolExecutor(request.processes, mp_context=get_context("spawn"))
    try:
        ahead = 4 * request.processes
        waiting = [pool.submit(_write_one, request, number) for number in numbers[:ahead]]
        for number in numbers:
            document = waiting.pop(0).result()
            if number + ahead < request.documents:
                waiting.append(pool.submit(_write_one, request, number + ahead))
            yield document
    except BrokenExecutor as error:
        raise ValueError(
            f"--processes={request.processes}: one of them was killed, perhaps for its memory; use fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check(request: DocumentRequest) -> None:
    """Refuse names and numbers, then what is too short, by one document of each task."""
    unknown = [name for name in request.tasks if name not in TRAINING_TASKS]
    if unknown or not request.tasks:
        raise ValueError(
            f"--tasks={','.join(unknown)}: there is no such task; use some of {', '.join(TRAINING_TASKS)}"
        )
    if "qa" in request.tasks:
        raise ValueError("--tasks=qa: asks what a file of questions holds; use qa_built")
    for name in ("documents", "processes"):
        if getattr(request, name) < 1:
            raise ValueError(f"--{name}={getattr(request, name)}: must be at least 1")
    material, counts = _inputs(request.tokenizer, request.haystack)
    for task in request.tasks:
        _fitting(task, min(request.lengths), "check", 0, material, counts, tries=1)


@cache
def _inputs(tokenizer: str, haystack: str) -> tuple[Material, TokenCounts]:
    """Load what documents are written with, once for each process."""
    material, _ = load_material(EvaluationConfig(tasks="", haystack=haystack))
    return material, TokenCounts(build_tokenizer(DataConfig(tokenizer=tokenizer)))


def _write_one(request: DocumentRequest, number: int) -> LongDocument:
    material, counts = _inputs(request.tokenizer, request.haystack)
    length = request.lengths[number % len(request.lengths)]
    task = random.Random(f"task/{request.seed}/{number}").choice(request.tasks)
    text = _fitting(task, length, str(request.seed), number, material, counts)
    return LongDocument(f"{task}#{number}", text, "synthesized", [task], {"length": length})


def _fitting(
    task: str,
    length: int,
    seed: str,
    number: int,
    material: Material,
    counts: TokenCounts,
    *,
    tries: int = _TRIES,
) -> str:
    """Make a document; where a draw does not fit, long names at a short length, another one is made.

    Raises:
        ValueError: no draw fits.
    """
    reason = TooShortError("")
    for turn in range(tries):
        try:
            return _sample(task, length, f"{seed}/{turn}" if turn else seed, number, material, counts)
        except TooShortError as error:
            reason = error
    raise ValueError(f"--lengths={length}: is too short for {task}, which {reason}; use a longer one")


def _sample(task: str, length: int, seed: str, number: int, material: Material, counts: TokenCounts) -> str:
    # evaluations have numbers for seeds, so none draws the same samples
    sample = build_sample(
        task,
        TRAINING_TASKS[task],
        seed=f"documents/{seed}",
        index=number,
        length=length,
        depth=random.Random(f"depth/{seed}/{number}").random(),
        counts=counts,
        material=material,
    )
    return sample.text


def request_summary(request: DocumentRequest) -> dict[str, Any]:
    """Say what was asked for, for the record beside the documents; processes change nothing in them."""
    return {name: value for name, value in asdict(request).items() if name != "processes"}
