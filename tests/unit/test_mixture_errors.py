"""Mistakes in a mixture: one line each, before anything starts."""

from dataclasses import asdict
from pathlib import Path

import pytest

from launchers.hydra_config.compose import compose_run, config_to_yaml
from launchers.hydra_config.compose import load_run as load_yaml
from msa_train.checkpoint.data_record import _weight_changes, record_of
from msa_train.config import StageConfig, check_rules
from msa_train.config.mixture.settings import BUCKETS
from msa_train.data.run_data import prepare_run
from tests.helpers.mixture_files import mixed_run, write_source

WEB = "data.mixture.web.corpus=stdlib"
STAGE = ("stages=warmup", WEB)


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    config = compose_run(
        [
            "run=demo",
            "stages=warmup",
            "data.mixture.web.corpus=/data/*.jsonl, old=1",
            "data.mixture.books={corpus: /b, weight: 2, buckets: {under_8K: 1, 128K-512K: 0.5}}",
            "data.mixture.books.buckets={over_512K: 1}",
            "data.mixture.web.weight=0",
            "stages.sparse.mixture={books: {8K-32K: 1}}",
            "stages.sparse.mixture.web=0.5",
        ]
    )
    assert config.data.mixture == {
        "web": {"corpus": "/data/*.jsonl, old=1", "weight": 0},
        "books": {
            "corpus": "/b",
            "weight": 2,
            "buckets": {"under_8K": 1, "128K-512K": 0.5, "over_512K": 1},
        },
    }
    assert config.stages["sparse"].mixture == {"books": {"8K-32K": 1}, "web": 0.5}
    check_rules(config, world_size=2, has_gpu=False)
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert load_yaml(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("data.mixture.web=1",),
            "data.mixture.web=1: must be a source; use data.mixture.web={corpus: PATH, weight: 1}",
        ),
        (
            ("data.mixture.web.weight=1",),
            "data.mixture.web.corpus=: must be a file, folder or glob; use data.mixture.web.corpus=PATH",
        ),
        (
            (WEB, "data.mixture.web.wieght=1"),
            "data.mixture.web.wieght: there is no such key; use one of corpus, weight, buckets",
        ),
        (
            (WEB, "data.mixture.web.weight=0"),
            "data.mixture: all weights are 0, so there is nothing to train on; use data.mixture.web.weight=1",
        ),
        (
            (WEB, "data.mixture.web.weight=-1"),
            "data.mixture.web.weight=-1: must be a finite number and not negative, such as 0.5",
        ),
        (
            (WEB, "data.mixture.web.weight=inf"),
            "data.mixture.web.weight=inf: must be a finite number and not negative, such as 0.5",
        ),
        (
            (WEB, "data.mixture.web.weight=much"),
            "data.mixture.web.weight=much: must be a number, such as 0.5",
        ),
        (
            (WEB, "data.mixture.web.buckets={8K: 1}"),
            "data.mixture.web.buckets.8K: there is no such bucket; use one of {BUCKET_LIST}",
        ),
        (
            (WEB, "data.mixture.web.buckets={under_8K: 0}"),
            "data.mixture.web.buckets: all weights are 0; use data.mixture.web.buckets={under_8K: "
            "1}, or none at all",
        ),
        (
            (WEB, "data.mixture.books.corpus=stdlib/"),
            "data.mixture.books.corpus=stdlib/: is that of data.mixture.web too, so its documents "
            "would come twice; leave one out and add up the weights",
        ),
        (
            ("data.mixture={a/b: {corpus: x}}",),
            "data.mixture.a/b: must be a name of letters, digits and _, such as data.mixture.books",
        ),
        (
            ("stages=warmup", "stages.sparse.mixture={web: 1}"),
            "stages.sparse.mixture={'web': 1}: the run has no sources to weigh; use data.mixture",
        ),
        (
            (*STAGE, "stages.sparse.mixture={books: 1}"),
            "stages.sparse.mixture.books: data.mixture has no such source; use one of web, or add it there",
        ),
        (
            (*STAGE, "stages.sparse.mixture={web: 0}"),
            "stages.sparse.mixture: all weights are 0, so the stage has nothing to train on; use "
            "stages.sparse.mixture={web: 1}",
        ),
        (
            (*STAGE, "stages.sparse.mixture={web: {long: 1}}"),
            "stages.sparse.mixture.web.long: there is no such bucket; use one of {BUCKET_LIST}",
        ),
    ],
)
def test_rules(settings: tuple[str, ...], message: str) -> None:
    config = compose_run(["run=demo", *settings])
    with pytest.raises(ValueError) as caught:
        check_rules(config, world_size=2, has_gpu=False)
    assert str(caught.value) == message.replace("{BUCKET_LIST}", ", ".join(BUCKETS))


def test_a_misspelt_stage_is_no_new_one() -> None:
    with pytest.raises(ValueError, match=r"stages.sprase.mixture.web=1: there is no such key"):
        compose_run(["run=demo", *STAGE, "stages.sprase.mixture.web=1"])


def test_a_weight_on_a_bucket_without_documents(tmp_path: Path) -> None:
    corpus = str(write_source(tmp_path, "w", [10, 20, 400]))
    run = mixed_run(tmp_path, {"web": {"corpus": corpus, "buckets": {"under_8K": 1, "over_512K": 0.5}}})
    with pytest.raises(ValueError) as caught:
        prepare_run(run)
    assert str(caught.value) == (
        "data.mixture.web.buckets.over_512K=0.5: source web has no document of that length to train on, its "
        "longest has 3,201 tokens; leave the bucket out, or make long documents with msa-data prepare"
    )
    run = mixed_run(
        tmp_path,
        {"web": {"corpus": corpus}},
        {"long": StageConfig(tokens=8192, mixture={"web": {"8K-32K": 2}})},
    )
    with pytest.raises(ValueError, match=r"^stages\.long\.mixture\.web\.8K-32K=2: source web has no doc"):
        prepare_run(run)


def test_the_same_documents_in_two_sources(tmp_path: Path) -> None:
    first = write_source(tmp_path / "one", "w", [10, 20])
    second = write_source(tmp_path / "two", "w", [10, 20])
    run = mixed_run(tmp_path, {"a": {"corpus": str(first)}, "b": {"corpus": str(second)}})
    with pytest.raises(ValueError, match=r"^data\.mixture\.b\.corpus=.*: holds the same documents as d"):
        prepare_run(run)
    inside = {"all": {"corpus": str(tmp_path / "one")}, "part": {"corpus": str(first)}}
    with pytest.raises(ValueError, match=r"^data\.mixture\.part\.corpus=.*: lies inside data\.mixture\.all"):
        prepare_run(mixed_run(tmp_path, inside))


def test_an_error_in_a_source_names_its_key(tmp_path: Path) -> None:
    run = mixed_run(tmp_path, {"web": {"corpus": str(tmp_path / "nothing")}})
    with pytest.raises(ValueError, match=r"^data\.mixture\.web\.corpus=.*nothing: does not exist; give a"):
        prepare_run(run)


def test_weights_of_a_stage_that_has_begun_stay(tmp_path: Path) -> None:
    corpora = {letter: str(write_source(tmp_path, letter, [40, 60])) for letter in ("w", "b")}
    mixture = {letter: {"corpus": corpus} for letter, corpus in corpora.items()}
    stages = {"one": StageConfig(tokens=8192 * 3), "two": StageConfig(tokens=8192 * 3)}
    run = mixed_run(tmp_path, mixture, stages)
    corpus = prepare_run(run)
    then = asdict(record_of(run, corpus))
    assert then["weights"]["one"] == {name: {"weight": 1.0, "buckets": {}} for name in mixture}
    run.stages["two"].mixture = {"w": 1}
    assert _weight_changes(run, record_of(run, corpus), then, 3) == [], "two is still to come"
    ((rule, fix),) = _weight_changes(run, record_of(run, corpus), then, 4)
    assert rule.startswith("stages.two.mixture: the checkpoint of step 4 was trained with other weights")
    assert "begins after 4" in fix
