"""A run that goes on is trained on the data it began with, and every rank on what was announced."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launchers.preflight import check_files
from msa_train.config import CheckpointConfig, DataConfig, RunConfig
from msa_train.data import prepare_corpus
from msa_train.training.checkpoint_store import find_to_resume
from msa_train.training.data_record import RECORD_NAME, hand_on, handed_on, record_of, resume_record
from msa_train.training.main import check_agreement, load_data
from tests.helpers.byte_tokenizer import byte_tokenizer_json
from tests.unit.test_training_checkpoint_store import save

STEP = 4


def _config(folder: Path, load: str = "", name: str = "run") -> RunConfig:
    corpus = folder / "texts"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for i in range(20):
            (corpus / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    data = DataConfig(corpus=str(corpus), cache_dir=str(folder / "cache"), seq_len=256)
    config = RunConfig(run_dir=str(folder / name), data=data, checkpoint=CheckpointConfig(load=load))
    config.model.vocab_size = 320
    return config


def _saved(config: RunConfig, step: int = STEP) -> RunConfig:
    """The run has prepared its data and saved a checkpoint."""
    Path(config.run_dir).mkdir(exist_ok=True)
    check_files(config, say=lambda _: None, hand_on=True)
    given = handed_on(config)
    assert given is not None
    batch = config.train.global_batch_size
    save(config, step, data=asdict(given[1]), consumed_samples=step * batch)
    return config


def _refusal(config: RunConfig) -> str:
    with pytest.raises(ValueError) as caught:
        check_files(config, say=lambda _: None)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") == 1, "rule; fix"
    assert message.partition("; ")[2].partition(" (also")[0].endswith("if it is meant")
    return message


def _said(config: RunConfig) -> list[str]:
    lines: list[str] = []
    check_files(config, say=lines.append, hand_on=True)
    return [line for line in lines if "(accepted)" in line or "no record of its data" in line]


def _more_documents(config: RunConfig) -> None:
    Path(config.data.corpus, "new.txt").write_text("one more")


def _other_text(config: RunConfig) -> None:
    path = Path(config.data.corpus, "3.txt")
    path.write_text(path.read_text().upper())


def _other_name(config: RunConfig) -> None:
    """The side of a document follows from its name."""
    Path(config.data.corpus, "3.txt").rename(Path(config.data.corpus, "three.txt"))


def _other_seed(config: RunConfig) -> None:
    config.data.seed = 7


def _other_share(config: RunConfig) -> None:
    config.data.validation_fraction = 0.5


def _other_tokenizer(config: RunConfig) -> None:
    config.data.tokenizer = str(byte_tokenizer_json(Path(config.data.cache_dir).parent))


CHANGES: list[tuple[Callable[[RunConfig], None], str]] = [
    (_more_documents, "data.corpus"),
    (_other_text, "data.corpus"),
    (_other_name, "data.corpus"),
    (_other_seed, "data.seed"),
    (_other_share, "data.validation_fraction"),
    (_other_tokenizer, "data.tokenizer"),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("change", "key"), CHANGES)
def test_other_data_are_refused_or_accepted_and_noted(
    tmp_path: Path, change: Callable[[RunConfig], None], key: str, own: bool
) -> None:
    config = _saved(_config(tmp_path))
    if not own:
        config = _config(tmp_path, load=config.run_dir, name="other")
        Path(config.run_dir).mkdir()
    assert _said(config) == []
    change(config)
    assert _refusal(config).startswith(f"{key}=")
    config.checkpoint.accept_other_data = True
    (line,) = _said(config)
    assert line.startswith(f"{key}=")
    given = handed_on(config)
    assert given is not None
    record = given[1]
    assert record.since_step == STEP
    assert [(before["since_step"], before["seed"]) for before in record.before] == [(0, 1234)]
    save(config, STEP + 1, data=asdict(record))
    config.checkpoint.accept_other_data = False
    assert _said(config) == [], "accepted once, it is what the run is trained on"
    given = handed_on(config)
    assert given is not None
    assert given[1] == record, "the change stays noted"


def test_every_change_is_named(tmp_path: Path) -> None:
    config = _saved(_config(tmp_path))
    for change in (_more_documents, _other_seed, _other_share):
        change(config)
    assert _refusal(config).endswith("(also different: data.validation_fraction, data.seed)")


def test_batch_size_of_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    config = _config(tmp_path, load=_saved(_config(tmp_path)).run_dir, name="other")
    config.train.global_batch_size = 2
    message = _refusal(config)
    assert message.startswith(
        "train.global_batch_size=2: the checkpoint of step 4 has used 4 packs, 1 per step"
    )
    assert "4 packs would be left out; use train.global_batch_size=1" in message
    config.checkpoint.accept_other_data = True
    Path(config.run_dir).mkdir()
    assert len(_said(config)) == 1


def test_batch_size_of_the_own_run_stays(tmp_path: Path) -> None:
    config = _saved(_config(tmp_path))
    config.train.global_batch_size, config.checkpoint.accept_other_data = 2, True
    with pytest.raises(
        ValueError, match=r"by one size, also with checkpoint\.accept_other_data; use train\."
    ):
        check_files(config, say=lambda _: None)


def test_another_length_is_said(tmp_path: Path) -> None:
    first = _saved(_config(tmp_path))
    record = handed_on(first)
    assert record is not None
    stage = {"name": "main", "first_step": 0, "num_steps": STEP + 1, "seq_len": 256}
    save(first, STEP + 1, data=asdict(record[1]), stages=[stage])
    config = _config(tmp_path, load=first.run_dir, name="other")
    lines: list[str] = []
    check_files(config, say=lines.append)
    assert not any(line.startswith("data.seq_len") for line in lines)
    config.data.seq_len = 512
    check_files(config, say=lines.append)
    assert lines[-1].startswith("data.seq_len=512: step_00000005 was trained with packs of 256 tokens")


def test_weights_alone_go_with_any_data(tmp_path: Path) -> None:
    config = _config(tmp_path, load=_saved(_config(tmp_path)).run_dir, name="other")
    config.train.global_batch_size, config.checkpoint.load_weights_only = 2, True
    _other_seed(config)
    check_files(config, say=lambda _: None)


def test_same_data_elsewhere_and_older_checkpoints_go_on(tmp_path: Path) -> None:
    config = _saved(_config(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = _config(tmp_path / "there")
    assert _said(moved) == []
    save(moved, STEP + 1)
    _other_seed(moved)
    (note,) = _said(moved)
    assert note.startswith("the checkpoint of step 5 has no record of its data; that corpus, ")
    assert config.data.seed != moved.data.seed


def test_workers_train_on_what_was_announced(tmp_path: Path) -> None:
    """Files that come between the announcement and the workers are no data of this start."""
    config = _config(tmp_path)
    Path(config.run_dir).mkdir()
    lines: list[str] = []
    check_files(config, say=lines.append, hand_on=True)
    _more_documents(config)
    data = load_data(config)
    assert any(f"20 documents, {data.corpus.num_tokens:,} tokens" in line for line in lines)
    assert data.corpus.num_documents == 20
    assert data.record.content == data.corpus.content
    config.data.seq_len = 512
    assert load_data(config).corpus.num_documents == 20, "stages may have other lengths"
    config.data.corpus = str(tmp_path / "texts" / "new.txt")
    assert load_data(config).corpus.num_documents == 1, "what was prepared for other settings is not used"


def test_workers_notice_that_the_files_are_others(tmp_path: Path) -> None:
    config = _config(tmp_path)
    corpus = prepare_corpus(config.data, vocab_size=320)
    Path(config.run_dir).mkdir()
    hand_on(config, corpus, record_of(config, corpus))
    with open(corpus.prefix + ".bin", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(ValueError, match=r"data.corpus=.*corpus\.bin has \d+ bytes, .*; start the run again"):
        load_data(config)
    Path(corpus.prefix + ".bin").unlink()
    with pytest.raises(ValueError, match=r"data.corpus=.*corpus\.bin cannot be read here .*; share it"):
        load_data(config)


def test_ranks_with_other_documents_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    data, cpu = load_data(config), torch.device("cpu")
    _other_text(config)
    other = int(load_data(config).corpus.content, 16) >> 1
    everyone = [torch.tensor([other, -other])]

    def all_reduce(tensor: torch.Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX
        tensor.copy_(torch.stack([tensor, *everyone]).amax(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(ValueError, match=r"data.corpus=.*: is not the same on all machines, .*; put run_dir"):
        check_agreement(data, cpu)
    everyone.clear()
    check_agreement(data, cpu)


def test_a_check_leaves_no_record_and_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    config = _config(tmp_path)
    check_files(config, say=lambda _: None)
    assert handed_on(config) is None
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / RECORD_NAME).write_text(json.dumps({"prepared_for": 3})[:-1])
    with pytest.raises(ValueError, match=r"run_dir=.*data.json is damaged; remove it"):
        handed_on(config)
    assert resume_record(config, prepare_corpus(config.data, vocab_size=320), find_to_resume(config))[1] == []
