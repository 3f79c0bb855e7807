"""Mixtures of real files: no document twice in an epoch, none lost, the same order on every layout."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from msa_train.config import AlternateConfig, RunConfig, StageConfig, plan_stages
from msa_train.data import BatchStream
from msa_train.data import load as data_load
from msa_train.data.carried.streams import passed_over
from msa_train.data.mixture.stages import MixedStages
from msa_train.data.run_data import load_mixture
from tests.helpers.mixture_files import mixed_run, words_of, write_source

# words of 8 bytes: 16 to 400 tokens, 9,600 to 16,000 and 40,000
SHORT, MIDDLE, LONG = [2, 10, 25, 50] * 60, [1200, 1500, 2000, 1300], [5000]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Half of the tokens from short documents, half from long ones in two buckets."""
    mixture = {
        "web": {"corpus": str(write_source(tmp_path, "w", SHORT)), "weight": 1},
        "books": {"corpus": str(write_source(tmp_path, "b", MIDDLE + LONG)), "weight": 1},
    }
    return mixed_run(tmp_path, mixture)


def _stages(**stages: StageConfig) -> dict[str, StageConfig]:
    return stages


def _load(run: RunConfig) -> MixedStages:
    return load_mixture(run)[1]


def _words(packs: MixedStages, config: RunConfig) -> dict[str, list[list[str]]]:
    """The words of every pack of every stage, in order."""
    return {
        stage.name: [
            words_of(packs.open(stage).usual[index])
            for index in range(stage.first_pack, stage.first_pack + stage.packs_before(stage.last_step)[0])
        ]
        for stage in plan_stages(config)
    }


def test_an_epoch_of_a_part_has_each_word_once_and_then_begins_again(run: RunConfig) -> None:
    run.train.steps = 60
    seen: dict[str, list[str]] = {"w": [], "b": []}
    for words in _words(_load(run), run)["main"]:
        assert len({word[0] for word in words}) == 1, "a pack has documents of one source"
        seen[words[0][0]] += words
    for letter, lengths in (("w", SHORT), ("b", MIDDLE)):
        total = sum(lengths)
        # of the books those of one bucket, which has epochs of its own
        words = [word for word in seen[letter] if letter == "w" or int(word[1:4]) < len(MIDDLE)]
        assert len(words) > 2 * total, "the run is longer than two epochs"
        for epoch in range(2):
            part = words[epoch * total : (epoch + 1) * total]
            assert len(set(part)) == total
        assert words[:total] != words[total : 2 * total], "in another order"


def test_packs_hold_documents_of_one_bucket_and_tokens_go_by_the_weights(run: RunConfig) -> None:
    run.data.mixture["books"] |= {"weight": 3, "buckets": {"8K-32K": 1, "32K-128K": 2}}
    run.train.steps = 400
    packs = _load(run)
    tokens: Counter[str] = Counter()
    for words in _words(packs, run)["main"]:
        kinds = {word[0] if word[0] == "w" else f"b{int(word[1:4]) == len(MIDDLE)}" for word in words}
        (kind,) = kinds
        tokens[kind] += len(words)
    shares = {kind: count / sum(tokens.values()) for kind, count in tokens.items()}
    assert shares == pytest.approx({"w": 0.25, "bFalse": 0.25, "bTrue": 0.5}, abs=0.01)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_order_does_not_depend_on_ranks_or_on_where_a_run_resumes(run: RunConfig, dp_size: int) -> None:
    batch = run.train.global_batch_size = 4
    expected = _words(_load(run), run)["main"]
    # each rank has files of its own open, and begins at another step, as after a restart
    first_step = 3
    streams = [BatchStream(_load(run).open(plan_stages(run)[0]).usual) for _ in range(dp_size)]
    for step in range(first_step, first_step + 4):
        got = [stream.packs(step * batch, r, dp_size, batch) for r, stream in enumerate(streams)]
        in_order = [words_of(got[i % dp_size][i // dp_size]) for i in range(batch)]
        assert in_order == expected[step * batch : (step + 1) * batch]
    for stream in streams:
        stream.close()


def test_a_stage_with_other_weights_goes_on_in_each_source(run: RunConfig) -> None:
    run.train.steps = 0
    run.stages = _stages(
        short=StageConfig(tokens=4096 * 4, mixture={"web": 3, "books": 1}),
        long=StageConfig(tokens=4096 * 6, mixture={"books": {"8K-32K": 1}}),
        again=StageConfig(tokens=4096 * 4, mixture={"web": 1}),
    )
    words = _words(_load(run), run)
    assert {word[0] for pack in words["long"] for word in pack} == {"b"}
    assert {word[0] for pack in words["again"] for word in pack} == {"w"}
    seen = Counter(word for stage in words.values() for pack in stage for word in pack)
    assert set(seen.values()) == {1}, "the run is shorter than an epoch of each part"


@pytest.mark.parametrize("lengths", [(4096, 16384, 2048), (16384, 4096, 8192)])
def test_another_length_goes_on_with_what_the_epoch_has_left(
    run: RunConfig, lengths: tuple[int, ...]
) -> None:
    run.train.steps = 0
    run.stages = {
        f"s{length}": StageConfig(seq_len=length, tokens=2 * length * steps, mixture={"books": 1})
        for length, steps in zip(lengths, (3, 2, 60), strict=True)
    }
    run.stages[f"s{lengths[0]}"].tokens = 2 * 4096 * 5
    words = _words(_load(run), run)
    # one part: documents of 8K to 32K tokens, in which stages stop in the middle of one
    order = [w for stage in words.values() for pack in stage for w in pack if int(w[1:4]) < len(MIDDLE)]
    total = sum(MIDDLE)
    assert len(order) > 2 * total
    for epoch in range(2):
        assert len(set(order[epoch * total : (epoch + 1) * total])) == total


def test_a_label_follows_where_the_rest_of_a_document_was_seen_before(run: RunConfig) -> None:
    run.train.steps = 0
    run.stages = _stages(
        one=StageConfig(tokens=2 * 4096, mixture={"books": {"8K-32K": 1}}),
        two=StageConfig(seq_len=16384, tokens=2 * 16384 * 2, mixture={"books": {"8K-32K": 1}}),
    )
    packs = _load(run)
    stage = plan_stages(run)[1]
    cut = 0
    for index in range(stage.first_pack, stage.first_pack + 2):
        pack = packs.open(stage).usual[index]
        for start, length in zip(pack.cu_seqlens, pack.doc_lengths, strict=False):
            last = int(start) + int(length) - 1
            # a document's last token is its end, and has no label; any other has one
            assert (pack.tokens[last] == 256) == (pack.labels[last] < 0)
            cut += int(pack.tokens[last] != 256)
    assert cut, "a document goes on where it was seen"


def test_mapped_packings_are_the_same(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train.steps = 0
    run.stages = _stages(one=StageConfig(tokens=4096 * 6), two=StageConfig(seq_len=8192, tokens=8192 * 12))
    expected = _words(_load(run), run)
    monkeypatch.setattr(data_load.pack_index, "MIN_DOCUMENTS", 1)
    assert _words(_load(run), run) == expected
    assert list(Path(run.data.cache_dir, "packs").glob("*/train_1/begin.dat"))
    assert _words(_load(run), run) == expected


def test_held_out_documents_are_in_the_shares_of_the_run(run: RunConfig) -> None:
    run.data.validation_fraction = 0.2
    packs = _load(run)
    validation = packs.validations()[4096]
    assert validation is not None
    held_out = {word for i in range(validation.num_packs) for word in words_of(validation[i])}
    assert {word[0] for word in held_out} == {"w", "b"}
    trained = {word for words in _words(packs, run)["main"] for word in words}
    assert not held_out & trained


def test_one_stage_is_made_at_a_time(run: RunConfig) -> None:
    packs, (stage,) = _load(run), plan_stages(run)
    assert packs.open(stage) is packs.open(stage)
    with pytest.raises(IndexError):
        packs.open(stage).usual[-1]


def _all_words(packs: MixedStages, config: RunConfig, rollbacks: Sequence[dict[str, int]] = ()) -> list[str]:
    """The words of all steps, as the trainer reads them."""
    words: list[str] = []
    for stage in plan_stages(config):
        stream = packs.open(stage, rollbacks)
        shift = passed_over([stage], stage.stream, rollbacks)
        for step in range(stage.first_step, stage.last_step):
            is_short = stage.is_alternate(step)
            source = stream.short if is_short else stream.usual
            assert source is not None
            first = stage.pack_at(step) + shift[is_short]
            for index in range(first, first + stage.batch_at(step)):
                words += words_of(source[index])
    return words


def test_steps_with_shorter_packs_take_from_the_same_sources(run: RunConfig) -> None:
    run.train.steps = 0
    alternate = AlternateConfig(every=2, seq_len=2048, global_batch_size=2)
    run.stages = _stages(
        one=StageConfig(tokens=8192 * 48, seq_len=8192, alternate=alternate),
        two=StageConfig(tokens=4096 * 8),
    )
    words = _all_words(_load(run), run)
    assert {word[0] for word in words} == {"w", "b"}
    for letter, lengths in (("w", SHORT), ("b", MIDDLE)):
        own = [w for w in words if w[0] == letter and (letter == "w" or int(w[1:4]) < len(MIDDLE))]
        assert len(own) > sum(lengths)
        # two kinds of packs may be an epoch apart within a stage, never two
        assert max(Counter(own).values()) <= 1 + -(-len(own) // sum(lengths))


def test_what_a_rollback_passes_over_does_not_come_in_a_later_stage(run: RunConfig) -> None:
    run.train.steps = 0
    run.stages = _stages(
        one=StageConfig(tokens=4096 * 4, mixture={"web": 1}),
        two=StageConfig(tokens=4096 * 2, mixture={"web": 1}),
    )
    plain = _all_words(_load(run), run)
    rolled = _all_words(_load(run), run, [{"to_step": 0, "from_step": 1}])
    assert len(set(plain)) == len(plain)
    assert len(set(rolled)) == len(rolled), "none comes twice"
    usual = _load(run).open(plan_stages(run)[0]).usual
    passed = {word for index in range(2) for word in words_of(usual[index])}
    assert passed <= set(plain)
    assert not passed & set(rolled)
