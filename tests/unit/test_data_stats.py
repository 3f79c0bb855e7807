"""What msa-data stats counts and says, and what metrics tell of the tokens of a step."""

import json
from pathlib import Path

import numpy as np
import pytest

from launchers.data import main
from msa_train.config import StageConfig
from msa_train.config.mixture.settings import BUCKET_EDGES, BUCKETS
from msa_train.data.origin import MADE_BY, OriginCounter, PackOrigin, bucket_of
from msa_train.data.run_data import prepare_run
from msa_train.data.stats import SourceLengths, learning_warnings, read_lengths, stage_readings
from msa_train.data.token_cache.store import TokenStore, write_store
from tests.helpers.mixture_files import mixed_run, write_source

K = 1024


def _source(*lengths: int) -> SourceLengths:
    count = len(lengths)
    return SourceLengths(np.array(lengths), np.arange(count), np.zeros(count, np.uint8))


def test_edges_of_buckets() -> None:
    edges = [edge + shift for edge in BUCKET_EDGES for shift in (-1, 0)]
    assert bucket_of(np.array(edges)).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_documents_are_found_by_their_tokens(tmp_path: Path) -> None:
    lengths = [0, 3, 0, 0, 2, 1, 0]
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    write_store(str(tmp_path / "c"), documents, vocab_size=300)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    found, sizes = store.documents_at(np.arange(sum(lengths)))
    assert found.tolist() == [1, 1, 1, 4, 4, 5]
    assert sizes.tolist() == [3, 3, 3, 2, 2, 1]


def test_shares_of_a_step() -> None:
    counter = OriginCounter(["web", "books"])
    book = PackOrigin("books", np.array([1, 3], np.uint8), np.array([0, 3], np.uint8))
    page = PackOrigin("web", np.array([0], np.uint8), np.zeros(1, np.uint8))
    packs = [(book, np.array([10, 20])), (page, np.array([10])), (None, np.array([99]))]
    counts = counter.count(packs)
    assert len(counts) == counter.size
    # ranks that hold copies of a pack change nothing
    assert counter.shares([8 * count for count in counts]) == counter.shares(counts)
    assert counter.shares(counts) == {
        "tokens_by_bucket": dict(zip(BUCKETS, [0.25, 0.25, 0, 0.5, 0], strict=True)),
        "tokens_by_source": {"books": 0.75, "web": 0.25},
        "tokens_by_source_bucket": {"books_8K-32K": 0.25, "books_128K-512K": 0.5, "web_under_8K": 0.25},
        "tokens_by_making": {"as_is": 0.5, "chapters": 0.5},
    }
    assert MADE_BY[3] == "chapters"
    one = OriginCounter([])
    plain = PackOrigin("", np.zeros(1, np.uint8), np.zeros(1, np.uint8))
    assert set(one.shares(one.count([(plain, np.array([5]))]))) == {"tokens_by_bucket"}
    assert one.shares(one.count([])) == {}


def test_stages_and_what_they_can_learn(tmp_path: Path) -> None:
    stages = {
        "short": StageConfig(tokens=32 * K * 2, seq_len=32 * K),
        "long": StageConfig(
            tokens=128 * K * 10, seq_len=128 * K, mixture={"books": {"128K-512K": 1}, "web": 1}
        ),
        "none": StageConfig(tokens=512 * K, seq_len=512 * K, mixture={"web": 1}),
    }
    mixture = {"books": {"corpus": "b"}, "web": {"corpus": "w"}}
    run = mixed_run(tmp_path, mixture, stages)
    run.train.global_batch_size = 1
    sources = {"books": _source(200 * K, 20 * K), "web": _source(*[K] * 100)}
    short, long, none = stage_readings(run, sources)
    # half of a pack is long for the first stage: pieces of 32K have 16K beyond it, the rest of 8K nothing
    books = (6 * 16 + 4) / 220
    assert short.beyond == 16 * K
    assert short.long_share == pytest.approx(books / 2)
    # 200K are pieces of 128K and 72K, beyond the 32K of the stage before
    assert long.long_share == pytest.approx((128 - 32 + 72 - 32) / 200 / 2)
    assert {(part.source, part.bucket) for part in long.parts} == {
        ("books", "128K-512K"),
        ("web", "under_8K"),
    }
    assert [part.epochs for part in long.parts] == pytest.approx([3.2, 6.4])
    assert "34.0% of its tokens have more than 32,768 before them" in long.sentences()[0]
    assert long.sentences()[1].endswith("reads web under_8K 6.4 times over")
    assert none.sentences()[0].startswith(
        "stage none (524,288 tokens in packs of 524,288): NOTHING TO LEARN FROM: no document that it draws "
        "has more than 131,072 tokens, the longest has 1,024; a pack of short documents trains no long range"
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web = write_source(tmp_path, "w", [10, 20, 0, 1500])
    books = write_source(tmp_path, "b", [5000])
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["stats", str(web), str(books), "--seq-len", "64K", *cache]) == 0
    out, _ = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["w", "under_8K", "2", "242", "0.5%"] in rows
    assert ["w", "8K-32K", "1", "12,001", "23.0%"] in rows
    assert ["b", "32K-128K", "1", "40,001", "76.6%"] in rows
    assert ["b", "0", "40,001", "as_is"] in rows, "the longest"
    assert "stage main (65,536 tokens in packs of 65,536): 13.8% of its tokens have more than 32,768" in out
    assert main(["stats", str(web), "--json", *cache]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["stages"] == []
    assert [row["documents"] for row in data["buckets"]] == [2, 1, 0, 0, 0]
    assert main(["stats", str(web), "run=demo", *cache]) == 2
    assert "give corpora, or a run and its settings, not both" in capsys.readouterr().err


def test_a_run_with_a_weight_on_an_empty_bucket_is_counted(tmp_path: Path) -> None:
    corpus = str(write_source(tmp_path, "w", [10, 20]))
    run = mixed_run(tmp_path, {"web": {"corpus": corpus, "buckets": {"over_512K": 1}}})
    (reading,) = stage_readings(run, read_lengths(run))
    assert reading.parts == []
    assert "NOTHING TO LEARN FROM" in reading.sentences()[0]


def test_a_start_names_stages_without_anything_to_learn(tmp_path: Path) -> None:
    short, long = write_source(tmp_path, "w", [100, 200]), write_source(tmp_path, "b", [1500])
    mixture = {"web": {"corpus": str(short)}, "books": {"corpus": str(long)}}

    def warnings(**stages: StageConfig) -> list[str]:
        run = mixed_run(tmp_path, mixture, stages)
        return learning_warnings(run, prepare_run(run))

    first = StageConfig(tokens=16 * K, seq_len=4 * K)
    only_short = StageConfig(tokens=16 * K, seq_len=8 * K, mixture={"web": 1})
    assert warnings(first=first, long=StageConfig(tokens=16 * K, seq_len=8 * K)) == []
    (warning,) = warnings(first=first, long=only_short)
    assert warning.startswith("stage long (16,384 tokens in packs of 8,192): NOTHING TO LEARN FROM")
    # packs of several documents are what short stages are made of
    assert warnings(first=only_short, second=first) == []
    very_long = StageConfig(tokens=128 * K, seq_len=128 * K)
    (warning,) = warnings(first=very_long)
    assert "in packs of 131,072): NOTHING TO LEARN FROM" in warning
