"""The place in the data over changes of length, batch and layout: each token once per epoch, none lost."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msa_train.config import AlternateConfig, RunConfig, StageConfig, plan_stages
from msa_train.data import IGNORE_LABEL, PackedDataset
from msa_train.data.carried.fragments import Fragments, join, split_short, whole_documents
from msa_train.data.carried.packs import CarriedPacks, Rest, unite
from msa_train.data.dataset import pack_view
from msa_train.data.pack_index import mapped_table
from msa_train.data.split import DocumentView
from msa_train.data.token_cache.store import TokenStore, write_store
from msa_train.training.stage_packs import StagePacks, passed_over

BLOCK_SIZE = 4
LENGTHS = [1, 2, 16, 17, 63, 64, 65, 200, 256, 5, *range(3, 60)]


@pytest.fixture
def whole(tmp_path: Path) -> dict[int, PackedDataset]:
    """Packs of several lengths of documents whose tokens are all different: token t is number t - 1."""
    edges = np.cumsum([0, *LENGTHS])
    documents = [np.arange(a + 1, b + 1).astype(np.int32) for a, b in itertools.pairwise(edges)]
    write_store(str(tmp_path / "c"), documents, vocab_size=70_000)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    view = DocumentView(store, store.begin, store.lengths, 70_000)
    return {
        length: PackedDataset(view, seq_len=length, block_size=BLOCK_SIZE, seed=5) for length in (16, 32, 64)
    }


def tokens_of(packs: Any, numbers: range) -> Counter[int]:
    return Counter(int(token) for i in numbers for token in packs[i].tokens if token)


def labels_of(packs: Any, numbers: range) -> int:
    return sum(packs[i].num_labels for i in numbers)


def carried(whole: dict[int, PackedDataset], length: int, rest: Rest) -> CarriedPacks:
    return CarriedPacks(whole[length], rest, seq_len=length, block_size=BLOCK_SIZE, seed=5)


def test_join_and_split() -> None:
    pieces = Fragments(np.array([4, 0, 20]), np.array([6, 4, 3]), np.array([0, 1, 0], np.uint8))
    joined = join(pieces)
    assert joined.begin.tolist() == [0, 20]
    assert joined.length.tolist() == [10, 3]
    assert joined.goes_on.tolist() == [0, 0]
    assert len(join(joined.take(np.zeros(2, np.bool_)))) == 0
    documents = whole_documents(np.cumsum([0, *LENGTHS])[:-1], np.array(LENGTHS))
    rest, short = split_short(documents, share=0.3, seq_len=64, seed=1)
    assert len(rest) + len(short) == len(LENGTHS)
    assert 0.3 <= short.num_tokens / documents.num_tokens < 0.35
    assert short.length.max() <= 64
    for share in (0.01, 0.99):
        few = split_short(documents.take(np.arange(len(documents)) < 2), share=share, seq_len=64, seed=1)
        assert [len(side) for side in few] == [1, 1]
    assert split_short(documents, share=0.3, seq_len=64, seed=2)[1].begin.tolist() != short.begin.tolist()


def test_nothing_changed_is_the_same_packs(whole: dict[int, PackedDataset]) -> None:
    packs = carried(whole, 32, Rest())
    for number in (0, 3, packs.num_packs, 2 * packs.num_packs + 1):
        np.testing.assert_array_equal(packs[number].tokens, whole[32][number].tokens)


@pytest.mark.parametrize("used", [0, 1, 7, 40, 200])
def test_each_token_once_per_epoch(whole: dict[int, PackedDataset], used: int) -> None:
    """Three lengths, one after another, stopped anywhere: then the rest of that epoch, and no more."""
    all_tokens = Counter(range(1, sum(LENGTHS) + 1))
    seen, rest = Counter[int](), Rest()
    num_labels = 0
    for length in (32, 16, 64):
        packs = carried(whole, length, rest)
        seen += tokens_of(packs, range(used))
        num_labels += labels_of(packs, range(used))
        rest = packs.rest(used)
    packs = carried(whole, 16, rest)
    seen += tokens_of(packs, range(packs.num_left))
    num_labels += labels_of(packs, range(packs.num_left))
    assert seen == Counter({token: rest.epoch * times for token, times in all_tokens.items()})
    # cuts move nothing into or out of the loss: a document's last token alone has no label
    assert num_labels == rest.epoch * (sum(LENGTHS) - len(LENGTHS))


def test_large_corpora_keep_the_rest_on_disk(whole: dict[int, PackedDataset], tmp_path: Path) -> None:
    mapped = {}
    for length, packs in whole.items():
        sizes = {"seq_len": length, "block_size": BLOCK_SIZE, "seed": 5}
        table = mapped_table(
            tmp_path / f"packs{length}" / "train",
            lambda packs=packs, sizes=sizes: pack_view(packs.view, **sizes),
            block_size=BLOCK_SIZE,
            seed=5,
        )
        mapped[length] = PackedDataset(
            packs.view, seq_len=length, block_size=BLOCK_SIZE, seed=5, table=table, reader=packs.reader
        )
    in_memory, on_disk = (carried(of, 64, carried(of, 16, Rest()).rest(60)) for of in (whole, mapped))
    assert len(list((tmp_path / "packs64").glob("rest_*/index.json"))) == 1
    for number in range(in_memory.num_left + 3):
        np.testing.assert_array_equal(in_memory[number].tokens, on_disk[number].tokens)
    before = in_memory.rest(5), on_disk.rest(5)
    assert before[0].rounds[0].checksum() == before[1].rounds[0].checksum()


def test_labels_of_cut_documents(whole: dict[int, PackedDataset]) -> None:
    packs = carried(whole, 64, carried(whole, 16, Rest()).rest(60))
    ends = set(np.cumsum(LENGTHS).tolist())
    for number in range(packs.num_left):
        pack = packs[number]
        real = pack.tokens > 0
        wanted = np.where(np.isin(pack.tokens, list(ends)), IGNORE_LABEL, pack.tokens + 1)
        np.testing.assert_array_equal(pack.labels[real], wanted[real])


def test_sets_that_are_epochs_apart_are_put_together(whole: dict[int, PackedDataset]) -> None:
    documents = whole_documents(whole[16].view.begin, whole[16].view.lengths)
    sides = split_short(documents, share=0.2, seq_len=16, seed=3)
    late = Rest((sides[0].take(np.arange(len(sides[0])) > 3),), 1)
    united = unite([late, Rest((sides[1].take(np.arange(len(sides[1])) > 1),), 3)], sides)
    assert united.epoch == 3
    tokens = [part.num_tokens for part in united.rounds]
    side_tokens = [side.num_tokens for side in sides]
    assert tokens[0] == late.num_tokens()
    assert tokens[1] == side_tokens[0]
    assert side_tokens[0] < tokens[2] < documents.num_tokens


def staged(**stages: StageConfig) -> RunConfig:
    config = RunConfig(stages=stages)
    config.data.seq_len, config.data.seed = 32, 5
    config.attention.block_size = BLOCK_SIZE
    config.train.steps = 0
    return config


def stages() -> RunConfig:
    """All changes: length, batch, steps of shorter packs, and a stage that goes on in the same packs."""
    return staged(
        first=StageConfig(tokens=6 * 64, global_batch_size=2),
        more=StageConfig(tokens=3 * 128, global_batch_size=4),
        mixed=StageConfig(
            tokens=6 * 128,
            seq_len=64,
            global_batch_size=2,
            alternate=AlternateConfig(every=3, seq_len=16),
        ),
        last=StageConfig(tokens=200 * 32, seq_len=16, global_batch_size=2),
    )


def trained_tokens(
    config: RunConfig, whole: dict[int, PackedDataset], *, dp_size: int, first_step: int = 0
) -> list[Counter[int]]:
    """Tokens of every step, by all data-parallel ranks, of a start after `first_step` updates."""
    packs, steps = StagePacks(config, whole), list[Counter[int]]()
    for stage in plan_stages(config):
        with packs.open(stage, []) as stream:
            for step in range(max(stage.first_step, first_step), stage.last_step):
                seen = Counter[int]()
                for rank in range(dp_size):
                    groups: Any = SimpleNamespace(dp_rank=rank, dp_size=dp_size)
                    for pack in stream.packs(step, groups):
                        assert len(pack.tokens) == stage.seq_len_at(step)
                        seen += Counter(int(token) for token in pack.tokens if token)
                steps.append(seen)
    return steps


def test_stages_see_each_document_once(whole: dict[int, PackedDataset]) -> None:
    config = stages()
    steps = trained_tokens(config, whole, dp_size=1)
    seen = sum(steps, Counter())
    times = set(seen.values())
    # the end is somewhere in an epoch: some tokens once more than the others, none twice more
    assert len(seen) == sum(LENGTHS)
    assert max(times) - min(times) <= 1
    # two data-parallel ranks, and a start anywhere, see the same
    assert trained_tokens(config, whole, dp_size=2) == steps
    for first in (5, 6, 9, 11, 14, 15, 30):
        assert trained_tokens(config, whole, dp_size=1, first_step=first) == steps[first:]


def test_rollbacks_shift_their_own_stream(whole: dict[int, PackedDataset]) -> None:
    config = stages()
    plan = plan_stages(config)
    events = [{"to_step": 4, "from_step": 7}, {"to_step": 10, "from_step": 12}, {"from_step": 8}]
    # steps 5 and 6 of 2 packs, step 7 of 4; then two of which the third of its stage has shorter packs
    assert [passed_over(plan, stream, events) for stream in (0, 2, 3)] == [(8, 0), (2, 8), (0, 0)]
    packs = StagePacks(config, whole)
    with packs.open(plan[1], events) as stream:
        assert stream.numbers(7) == range(12 + 4 + 8, 12 + 8 + 8)
    with packs.open(plan[2], []) as one, packs.open(plan[2], events) as other:
        numbers = one.numbers(9), other.numbers(9)
        assert numbers == (range(2), range(2, 4))
        assert tokens_of(one._usual._dataset, range(4)) != tokens_of(other._usual._dataset, range(4))


def test_too_few_documents_for_two_lengths(tmp_path: Path) -> None:
    write_store(str(tmp_path / "c"), [np.arange(1, 200, dtype=np.int32)], vocab_size=70_000)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    view = DocumentView(store, store.begin, store.lengths, 70_000)
    whole = {n: PackedDataset(view, seq_len=n, block_size=BLOCK_SIZE, seed=5) for n in (16, 32, 64)}
    config = stages()
    with pytest.raises(ValueError, match=r"^stages\.mixed\.alternate\.every=3: the corpus has too few"):
        StagePacks(config, whole).open(plan_stages(config)[2], [])
