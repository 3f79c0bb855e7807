"""Record what data a run is trained on: handed to all ranks, kept in checkpoints, compared on resume.

    launcher     prepares the corpus; `resume_record` compares it with the checkpoint; `hand_on` writes both
    workers      `handed_on` reads them; the trainer puts the record into meta.json of every checkpoint
    next start   `resume_record` again: other documents, tokenizer, seed or split are refused

For run_dir/data.json see `hand_on`, for "data" in a checkpoint's meta.json `DataRecord`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msa_train.checkpoint.compatibility import planned_samples
from msa_train.checkpoint.find import ResumePoint
from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.config.mixture.rules import stage_weights
from msa_train.data import Corpus
from msa_train.runtime.atomic_files import write_json

RECORD_NAME = "data.json"
SWITCH = "checkpoint.accept_other_data=true"
# Of the data settings these change nothing about what is prepared: stages cut packs of their own lengths, and
# the seed only orders documents.
_NOT_PREPARED_FOR = {"seq_len", "seed"}


@dataclass(kw_only=True, slots=True)
class DataRecord:
    """Hold what decides which packs a step sees, besides the stages and the step itself; plain JSON.

    Example: a run whose corpus grew at step 200 has since_step=200 and before=[{"corpus": ..., "since_step":
    0}], one record of the documents of its first 200 steps.
    """

    corpus: str
    "as the setting named it; for messages only, as paths may change"
    tokenizer: str
    "as the setting named it; for messages only"
    content: str
    "see Corpus.content; where it is the same, so are the order of the documents and their tokens"
    tokenizer_content: str | None
    "see Corpus.tokenizer"
    num_documents: int
    "documents of the corpus, held-out ones included"
    num_tokens: int
    "tokens of the corpus"
    seed: int
    "data.seed, which orders the documents"
    validation_fraction: float
    "share of the documents that is held out"
    global_batch_size: int
    "packs per step"
    weights: dict[str, Any] = field(default_factory=dict[str, Any])
    "of the mixture's sources and their buckets, by stage; empty without a mixture"
    since_step: int = 0
    "updates made before the first one with these data"
    before: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    "earlier records of the run, oldest first; empty where the data never changed"


def record_of(config: RunConfig, corpus: Corpus) -> DataRecord:
    """Make the record of a run that begins."""
    return DataRecord(
        corpus=corpus.description if corpus.sources else config.data.corpus,
        tokenizer=config.data.tokenizer,
        content=corpus.content,
        tokenizer_content=corpus.tokenizer,
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        seed=config.data.seed,
        validation_fraction=config.data.validation_fraction,
        global_batch_size=config.train.global_batch_size,
        weights={
            stage: {name: asdict(weight) for name, weight in weights.items()}
            for stage, weights in stage_weights(config).items()
        },
    )


def resume_record(
    config: RunConfig, corpus: Corpus, found: ResumePoint | None
) -> tuple[DataRecord, list[str]]:
    """Make the record of a run that goes on from a checkpoint, and tell what has changed.

    Checkpoints that are older than the record are said to be so; those of which the weights alone are taken
    say nothing.

    Example: data.seed=1 where the checkpoint has seed 0 is refused. With checkpoint.accept_other_data=true
    the old record moves into `before`, and `since_step` becomes the checkpoint's step.

    Args:
        config: the run that goes on.
        corpus: its documents, as they are now.
        found: the checkpoint; None: the run begins.

    Returns:
        The record, and lines for the user.

    Raises:
        ValueError: naming the value, the rule and the fix, if the data are others and nobody accepts that.
    """
    now = record_of(config, corpus)
    # with the weights alone a run begins at step 0, so no pack of it was seen
    if found is None or found.weights_only:
        return now, []
    meta = found.meta.get("data")
    then: dict[str, Any] = meta if isinstance(meta, dict) else {}
    changes = [*_changes(now, then, found.step), *_batch_change(config, found)]
    changes += _weight_changes(config, now, then, found.step)
    # the run's history, whatever its settings are now
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
    # without what was before in it, or each record would hold all earlier ones again
    if then:
        now.before = [*now.before, {key: value for key, value in then.items() if key != "before"}]
    now.since_step = found.step
    return now, [*(f"{rule} (accepted)" for rule, _ in changes), *notes]


def _changes(now: DataRecord, then: dict[str, Any], step: int) -> list[tuple[str, str]]:
    """List rule and fix for each setting that differs, the one to blame first.

    Other tokens can come of another tokenizer or of other documents; the tokenizer's checksum tells which.
    """
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


def _weight_changes(
    config: RunConfig, now: DataRecord, then: dict[str, Any], step: int
) -> list[tuple[str, str]]:
    """Say that a stage that has begun weighs its sources in another way: its packs would be others.

    Stages that are still to come may change.
    """
    for stage in plan_stages(config):
        old = then.get("weights", {}).get(stage.name)
        if stage.first_step < step and old is not None and old != now.weights.get(stage.name):
            key = f"stages.{stage.name}.mixture" if config.stages else "data.mixture"
            rule = f"{key}: the checkpoint of step {step} was trained with other weights in this stage, so "
            rule += "documents would come twice and others late"
            return [(rule, f"use those of the run's config.yaml, or change a stage that begins after {step}")]
    return []


def _others(changes: list[tuple[str, str]]) -> str:
    """Name what else differs: one error names all settings, so that nobody mends them one start at a time."""
    keys = [rule.partition("=")[0] for rule, _ in changes[1:]]
    return f" (also different: {', '.join(keys)})" if keys else ""


def _size(record: dict[str, Any]) -> str:
    """Say how many documents and tokens a record has."""
    return f"{record.get('num_documents')} with {record.get('num_tokens')} tokens"


def _batch_change(config: RunConfig, found: ResumePoint) -> list[tuple[str, str]]:
    """Say how another batch size shifts the packs: the next one is found from the step.

    A run's own checkpoint is refused before, by `compatibility`.

    Example: 100 steps have used 800 packs, 8 per step. With 4 per step 400 packs would be seen twice, with 16
    per step 800 would be left out.
    """
    batch, consumed, step = config.train.global_batch_size, found.meta["consumed_samples"], found.step
    planned = planned_samples(config, step)
    if found.own or not step or consumed == planned:
        return []
    told = "left out" if planned > consumed else "seen twice"
    rule = f"the checkpoint of step {step} has used {consumed} packs, {consumed / step:g} per step, so "
    rule += f"{abs(planned - consumed)} packs would be {told}"
    return [(f"train.global_batch_size={batch}: {rule}", f"use train.global_batch_size={consumed / step:g}")]


def _length_change(config: RunConfig, found: ResumePoint) -> list[str]:
    """Say that packs have another length; only said, since checkpoints are often loaded for longer ones."""
    stages: Any = found.meta.get("stages")
    # the last stage that had begun is the checkpoint's
    then = stages[-1].get("seq_len") if stages and not found.own else None
    now = stage_at(plan_stages(config), max(found.step - 1, 0)).seq_len
    if then is None or then == now:
        return []
    return [
        f"data.seq_len={now}: {found.path.name} was trained with packs of {then} tokens; now the packs are "
        "others, and documents that it has seen may come again before the rest"
    ]


def hand_on(config: RunConfig, corpus: Corpus, record: DataRecord) -> None:
    """Write what was prepared into run_dir/data.json; one process calls it before the workers start.

    The file holds {"prepared_for": data settings, "prepared": Corpus, "record": DataRecord}.

    Args:
        config: the run.
        corpus: its documents.
        record: see `resume_record`.

    Raises:
        OSError: if it cannot be written.
    """
    content = {"prepared_for": _prepared_for(config), "prepared": asdict(corpus), "record": asdict(record)}
    write_json(Path(config.run_dir) / RECORD_NAME, content)


def handed_on(config: RunConfig) -> tuple[Corpus, DataRecord] | None:
    """Read what the launcher prepared; None where nobody has prepared these settings, as in tests.

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
    """Collect the settings that decide what is prepared; a file for others is not for this run."""
    settings = {name: value for name, value in asdict(config.data).items() if name not in _NOT_PREPARED_FOR}
    # relative paths mean what they meant to the launcher, whose folder its workers share
    return {**settings, "vocab_size": config.model.vocab_size}
