"""Ranks of a job that answer, stall or fail, told apart through a store in this process."""

from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from msa_train.checkpoint.all_ranks import CheckpointError
from msa_train.parallel.comm import fault_watch
from msa_train.parallel.comm.fault_watch import FaultWatch, watched
from msa_train.parallel.comm.rank_faults import ExchangeError, has_lost_others, is_out_of_memory, reason_of

TIMEOUT_S = 20.0


class GivenUpError(Exception):
    """In place of the end of the process."""


def give_up(error: ExchangeError) -> None:
    raise GivenUpError(str(error))


def ranks_of(count: int, store: Store | None = None) -> list[FaultWatch]:
    """Watches without threads: a test looks for them."""
    store = store or HashStore()
    return [
        FaultWatch(store, range(count), rank, timeout_s=TIMEOUT_S, give_up=give_up) for rank in range(count)
    ]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No grace to wait for, and no watch left behind."""
    monkeypatch.setattr(fault_watch, "GRACE_S", 0.2)
    yield
    fault_watch._current = None


def test_a_silent_rank_is_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 stops; rank 1 listens for it, the others hear of it."""
    ranks = ranks_of(4)
    for watch in ranks:
        watch.entered(3, "kv", 8)
        assert not watch.look(0.5)
    alive = [watch for watch in ranks if watch.rank != 2]
    for rank in (0, 3):
        # as their threads would, while rank 1 waits for answers
        ranks[rank]._answer()
    ranks[1].waiting(0, "grad", 0)
    told: dict[int, str] = {}
    for _ in range(100):
        for watch in alive:
            if watch.rank in told:
                continue
            try:
                watch.look(0.5)
            except GivenUpError as error:
                told[watch.rank] = str(error)
        if len(told) == 3:
            break
    else:
        raise AssertionError("nobody noticed")
    stalled = "rank 2 does not answer and is dead or stalled"
    why = "no sign of life for 20 s, launcher.timeout_s"
    assert told[1] == f"reducing gradients (grad): {stalled}; rank 1 lost the others ({why})"
    for rank in (0, 3):
        assert told[rank].startswith(f"computing after layer 3, fetching keys and values (kv): {stalled}; ")


def test_when_silence_is_too_long() -> None:
    first, second = ranks_of(2)
    first.look(0.5)
    second.look(0.5)
    for _ in range(39):
        assert not first.look(0.5), "within the limit and one sign of life"
    second.look(0.5)
    assert not first.look(0.5), "it has spoken"
    second.close()


def test_a_rank_that_has_ended_well_is_not_missed() -> None:
    first, second = ranks_of(2)
    second.start()
    second.close()
    for _ in range(200):
        assert not first.look(0.5)


def test_a_rank_without_memory_is_blamed() -> None:
    """Its own error stays what it is, and the others repeat it."""
    first, second = ranks_of(2)
    for own in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ):
        assert is_out_of_memory(own)
        assert second.failure(1, "kv", 0, own) is own
    second.tell(own)
    lost = first.failure(1, "kv", 0, RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    assert isinstance(lost, ExchangeError)
    assert str(lost).startswith(
        "layer 1, fetching keys and values (kv): rank 1 has failed (RuntimeError: [enforce fail at alloc_cpu"
    )
    assert "rank 0 lost the others (Connection closed by peer" in str(lost)


def test_one_enquiry_serves_all() -> None:
    """A second one to ask takes what the first has found, though rank 2 answers meanwhile."""
    ranks = ranks_of(3)
    ranks[1].failure(2, "kv", 0, RuntimeError("timed out"))
    with pytest.raises(GivenUpError):
        ranks[2].look(0.5)
    text = str(ranks[0].failure(2, "kv", 0, RuntimeError("timed out")))
    point = "layer 2, fetching keys and values (kv)"
    assert text.startswith(f"{point}: rank 0, rank 2 do not answer and are dead or stalled; rank 0 lost")


def test_ranks_at_different_points_are_told_apart() -> None:
    ranks = ranks_of(2)
    ranks[1].entered(4, "request", 3)
    ranks[1]._answer()
    text = str(ranks[0].failure(5, "index_key", 0, RuntimeError("Timed out")))
    assert "all ranks answer; rank 1 is at: computing after layer 4, exchanging block requests" in text


def test_a_store_that_does_not_answer_ends_the_wait() -> None:
    (watch, _) = ranks_of(2)
    watch.waiting(0, "stop", 0)
    watch.tick(TIMEOUT_S)
    with pytest.raises(
        GivenUpError, match=r"^asking whether to stop .* no answer from the job's store for 20 s"
    ):
        watch.tick(0.5)


def test_collectives_of_the_run_name_their_point() -> None:
    with pytest.raises(RuntimeError, match=r"^Connection reset"), watched("grad"):
        raise RuntimeError("Connection reset by peer")
    first, second = ranks_of(2)
    first.make_current()
    second._answer()
    with (
        pytest.raises(
            ExchangeError, match=r"^layer 2, exchanging tokens with the experts' ranks \(expert\): "
        ),
        watched("step"),
        watched("expert", 2),
    ):
        raise RuntimeError("Timed out waiting 20000ms for recv operation to complete")
    with pytest.raises(ValueError, match="else"), watched("step"):
        raise ValueError("something else")
    with pytest.raises(RuntimeError, match=r"^shapes differ"), watched("step"):
        raise RuntimeError("shapes differ")


def test_what_no_point_has_named_is_named_at_the_end() -> None:
    """Of a collective within a library; errors that say more stay what they are."""
    first, second = ranks_of(2)
    second._answer()
    first.entered(1, "kv", 0)
    lost = first.ending(RuntimeError("Connection closed by peer"))
    assert str(lost).startswith("layer 1, fetching keys and values (kv): rank 0 lost the others (Connection")
    own = CheckpointError("checkpoint of step 3 could not be saved: rank 1: TimeoutError: timed out")
    assert ranks_of(2)[0].ending(own) is own


def test_what_a_lost_rank_looks_like() -> None:
    for text in ("Connection closed by peer", "Timed out waiting 20000ms for send operation", "Broken pipe"):
        assert has_lost_others(RuntimeError(text))
    gloo = RuntimeError("[/x/gloo/pair.cc:5] Timed out waiting\n20000ms")
    assert reason_of(gloo) == "Timed out waiting 20000ms"
    assert not has_lost_others(RuntimeError("the size of tensor a must match"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
