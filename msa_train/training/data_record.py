"""What data a run is trained on: prepared once, handed to all ranks, kept in checkpoints, compared on resume.

Format of run_dir/data.json and of "data" in a checkpoint's meta.json: see `hand_on` and `DataRecord`.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.data import Corpus
from msa_train.training.checkpoint_store import Found

RECORD_NAME = "data.json"
SWITCH = "checkpoint.accept_other_data=true"
# Of the data settings these change nothing about what is prepared: stages have their own lengths.
_NOT_PREPARED_FOR = {"seq_len", "seed"}


@dataclass(kw_only=True, slots=True)
class DataRecord:
    """What decides which packs a step sees, besides the stages and the step itself; plain JSON.

    Attributes:
        corpus, tokenizer: as the settings named them; for messages, as paths may change.
        content: see Corpus.content; with it the order of the documents and their tokens are the same.
        tokenizer_content: see Corpus.tokenizer.
        since_step: first step that was made with these data.
        before: earlier records of the run, oldest first; empty where the data never changed.
    """

    corpus: str
    tokenizer: str
    content: str
    tokenizer_content: str | None
    num_documents: int
    num_tokens: int
    seed: int
    validation_fraction: float
    global_batch_size: int
    since_step: int = 0
    before: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def record_of(config: RunConfig, corpus: Corpus) -> DataRecord:
    """The record of a run that begins."""
    return DataRecord(
        corpus=config.data.corpus,
        tokenizer=config.data.tokenizer,
        content=corpus.content,
        tokenizer_content=corpus.tokenizer,
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        seed=config.data.seed,
        validation_fraction=config.data.validation_fraction,
        global_batch_size=config.train.global_batch_size,
    )


def resume_record(config: RunConfig, corpus: Corpus, found: Found | None) -> tuple[DataRecord, list[str]]:
    """The record of a run that goes on from a checkpoint, and what to tell the user.

    Checkpoints that are older than the record are said to be so; those of which the weights alone are taken
    say nothing.

    Raises:
        ValueError: naming the value, the rule and the fix, if the data are others and nobody accepts that.
    """
    now = record_of(config, corpus)
    if found is None or found.weights_only:
        return now, []
    meta = found.meta.get("data")
    then: dict[str, Any] = meta if isinstance(meta, dict) else {}
    changes = [*_changes(now, then, found.step), *_batch_change(config, found)]
    now.since_step, now.before = then.get("since_step", 0), then.get("before", [])
    notes = _length_change(config, found)
    if not then:
        unchecked = "that corpus, tokenizer, seed and split are the same is not checked"
        notes.insert(0, f"the checkpoint of step {found.step} has no record of its data; {unchecked}")
    if not changes:
        return now, notes
    if not config.checkpoint.accept_other_data:
        rule, fix = changes[0]
        raise ValueError(f"{rule}; {fix}, or {SWITCH} if it is meant{_others(changes)}")
    if then:
        now.before = [*now.before, {key: value for key, value in then.items() if key != "before"}]
    now.since_step = found.step
    return now, [*(f"{rule} (accepted)" for rule, _ in changes), *notes]


def _changes(now: DataRecord, then: dict[str, Any], step: int) -> list[tuple[str, str]]:
    """Rule and fix for each setting that differs, the one to blame first."""
    changes: list[tuple[str, str]] = []
    origin = f"the checkpoint of step {step} was trained with"
    if then and then.get("content") != now.content:
        if then.get("tokenizer_content") != now.tokenizer_content:
            rule = f"{origin} another one, {then.get('tokenizer')}, so the same ids mean other text now"
            changes.append((f"data.tokenizer={now.tokenizer}: {rule}", "use that one"))
        else:
            rule = f"{origin} other documents, {_size(then)} in {then.get('corpus')}, and here are"
            rule += f" {_size(asdict(now))}, and what is held out now may have been trained on"
            changes.append((f"data.corpus={now.corpus}: {rule}", "give that corpus"))
    for key, why in (
        (
            "validation_fraction",
            "documents that it was trained on would be held out, or held-out ones trained on",
        ),
        ("seed", "the order would begin anew, so some documents would come twice and others late"),
    ):
        if key in then and then[key] != getattr(now, key):
            rule = f"data.{key}={getattr(now, key)}: {origin} data.{key}={then[key]}, {why}"
            changes.append((rule, f"use data.{key}={then[key]}"))
    return changes


def _others(changes: list[tuple[str, str]]) -> str:
    keys = [rule.partition("=")[0] for rule, _ in changes[1:]]
    return f" (also different: {', '.join(keys)})" if keys else ""


def _size(record: dict[str, Any]) -> str:
    return f"{record.get('num_documents')} with {record.get('num_tokens')} tokens"


def _batch_change(config: RunConfig, found: Found) -> list[tuple[str, str]]:
    """The next pack is found from the step; for a run's own checkpoint, checkpoint_store.py refuses it."""
    batch, consumed, step = config.train.global_batch_size, found.meta["consumed_samples"], found.step
    if found.own or not step or consumed == step * batch:
        return []
    told = "left out" if step * batch > consumed else "seen twice"
    rule = f"the checkpoint of step {step} has used {consumed} packs, {consumed / step:g} per step, so "
    rule += f"{abs(step * batch - consumed)} packs would be {told}"
    return [(f"train.global_batch_size={batch}: {rule}", f"use train.global_batch_size={consumed / step:g}")]


def _length_change(config: RunConfig, found: Found) -> list[str]:
    """Longer packs are what another run's checkpoint is often loaded for, so this is only said."""
    stages: Any = found.meta.get("stages")
    then = stages[-1].get("seq_len") if stages and not found.own else None
    now = stage_at(plan_stages(config), max(found.step - 1, 0)).seq_len
    if then is None or then == now:
        return []
    return [
        f"data.seq_len={now}: {found.path.name} was trained with packs of {then} tokens; now the packs are "
        "others, and documents that it has seen may come again before the rest"
    ]


def hand_on(config: RunConfig, corpus: Corpus, record: DataRecord) -> None:
    """Write what was prepared, for the workers; one process calls it before they start."""
    content = {"prepared_for": _prepared_for(config), "prepared": asdict(corpus), "record": asdict(record)}
    path = Path(config.run_dir) / RECORD_NAME
    partial = path.with_name(f".{RECORD_NAME}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def handed_on(config: RunConfig) -> tuple[Corpus, DataRecord] | None:
    """What the launcher prepared; None where nobody has prepared these settings, as in tests.

    Raises:
        ValueError: if the file cannot be understood.
    """
    path = Path(config.run_dir) / RECORD_NAME
    try:
        content = json.loads(path.read_bytes())
        if content["prepared_for"] != _prepared_for(config):
            return None
        return Corpus(**content["prepared"]), DataRecord(**content["record"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run_dir={config.run_dir}: {path} is damaged; remove it") from error


def _prepared_for(config: RunConfig) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(config.data).items() if name not in _NOT_PREPARED_FOR}
    # relative paths mean what they meant to the launcher, whose folder its workers share
    return {**settings, "vocab_size": config.model.vocab_size}
