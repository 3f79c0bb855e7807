"""Recorded and made-up selections: what is read back, what f means, what never changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from msa_kernels import select_blocks
from numpy.typing import NDArray

from msa_train.parallel.kv_exchange.requests import needed_kv_blocks
from msa_train.parallel.selection_file import SelectionRecorder
from msa_train.simulate.costs.demand import collect_wants
from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.selections.recorded import read_selections
from msa_train.simulate.selections.synthetic import SyntheticSelections
from tests.helpers.simulation import alike, stated

S, BLOCK_SIZE, TOPK, M = 256, 4, 3, 2
CU_SEQLENS = [0, 100, 256]


def some_selection() -> NDArray[np.int32]:
    generator = torch.Generator().manual_seed(1)
    q_index, k_index = torch.randn(S, M, 5, generator=generator), torch.randn(S, 5, generator=generator)
    cu_seqlens = torch.tensor(CU_SEQLENS)
    return select_blocks(q_index, k_index, cu_seqlens, block_size=BLOCK_SIZE, topk=TOPK).numpy()


def record(
    folder: Path, blocks: NDArray[np.int32], parts: int, chunk_tokens: int = 4, **changes: int
) -> None:
    T = S // parts
    for part in range(parts):
        values = {"first_token": part * T, "num_tokens": T, "seq_len": S, **changes}
        recorder = SelectionRecorder(
            block_size=BLOCK_SIZE, num_kv_heads=M, topk=TOPK, chunk_tokens=chunk_tokens,
            cu_seqlens=CU_SEQLENS,
            num_samples=T, **values,
        )  # fmt: skip
        recorder.add(3, blocks[part * T : (part + 1) * T])
        recorder.add(
            5, np.where(blocks[part * T : (part + 1) * T] > 2, -1, blocks[part * T : (part + 1) * T])
        )
        recorder.save(folder / f"{part}.npz", "run x, step 7")


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "dealt"])
def test_a_recording_gives_back_what_was_needed(tmp_path: Path, parts: int, layout: str) -> None:
    blocks = some_selection()
    record(tmp_path, blocks, parts)
    layers = read_selections(tmp_path if parts > 1 else tmp_path / "0.npz")
    assert [layer.layer for layer in layers] == [3, 5]
    assert "run x, step 7" in layers[0].describe()
    placement = place(layout, seq_len=S, block_size=BLOCK_SIZE, cp_size=4, cu_seqlens=CU_SEQLENS)
    share = layers[0].local_share(placement)
    for rank in range(4):
        rows = np.concatenate(
            [np.arange(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE) for b in placement.order[rank]]
        )
        mine = torch.from_numpy(blocks[rows])
        assert np.array_equal(
            layers[0].needed(placement, rank), needed_kv_blocks(mine, S // BLOCK_SIZE).numpy()
        )
        valid = blocks[rows] >= 0
        local = valid & (placement.owner[np.maximum(blocks[rows], 0)] == rank)
        assert share[rank] == pytest.approx(local.sum() / valid.sum())
    assert not layers[1].needed(placement, 0)[:, 3:].any()


def test_requests_are_numbered_by_owner(tmp_path: Path) -> None:
    """Bits as the planner packs them: lowest first, group * NL + place among the owner's blocks."""
    blocks = some_selection()
    record(tmp_path, blocks, 1)
    placement = place("zigzag", seq_len=S, block_size=BLOCK_SIZE, cp_size=4, cu_seqlens=CU_SEQLENS)
    layer = read_selections(tmp_path)[0]
    wants = collect_wants(layer, placement, M, 1)
    bits = np.unpackbits(wants.bits[0].numpy(), axis=2, bitorder="little")
    for rank in range(4):
        needed = layer.needed(placement, rank)
        for owner in range(4):
            expected = needed[:, placement.order[owner]].reshape(-1) & (owner != rank)
            assert np.array_equal(bits[rank, owner][: expected.shape[0]].astype(bool), expected)
    assert wants.pairs.sum() == bits.sum()


def test_recordings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    blocks = some_selection()
    record(tmp_path / "a", blocks, 4)
    placement = place("contiguous", seq_len=S, block_size=BLOCK_SIZE, cp_size=4)
    (tmp_path / "a" / "1.npz").unlink()
    with pytest.raises(ValueError, match=r"tokens from 64 on are not covered; add the missing part"):
        read_selections(tmp_path / "a")
    (tmp_path / "a" / "0.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"0\.npz: is not an \.npz file"):
        read_selections(tmp_path / "a" / "0.npz")
    empty = tmp_path / "empty"
    empty.mkdir()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="is not a recording of selections"):
        read_selections(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"holds no \.npz part"):
        read_selections(empty)
    record(tmp_path / "b", blocks, 1, chunk_tokens=128)
    (coarse, _) = read_selections(tmp_path / "b")
    with pytest.raises(ValueError, match="cp_size=4: its shards cut the recording's chunks of 128 tokens"):
        coarse.needed(placement, 0)
    with pytest.raises(ValueError, match="the recording has 256 and 4; use these"):
        coarse.needed(place("contiguous", seq_len=512, block_size=4, cp_size=4), 0)


def test_the_recorder_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_tokens=256: must be a multiple of chunk_tokens=96"):
        SelectionRecorder(768, 4, M, TOPK, 0, 256, 96, [0, 768])
    with pytest.raises(ValueError, match="chunk_tokens=2: must be a multiple of block_size=4"):
        SelectionRecorder(S, 4, M, TOPK, 0, S, 2, [0, S])
    recorder = SelectionRecorder(S, 4, M, TOPK, 0, S, 4, [0, S])
    with pytest.raises(ValueError, match=r"block_indices.shape=\(256, 2, 2\): must be \(256, 2, 3\)"):
        recorder.add(0, some_selection()[:, :, :2])
    with pytest.raises(ValueError, match="no layer was recorded"):
        recorder.save(tmp_path / "x.npz", "")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "dealt"])
@pytest.mark.parametrize("num_docs", [1, 3])
@pytest.mark.parametrize(
    "selections", [stated(0.1), alike(128), alike(32), alike(512)], ids=lambda s: s.describe()
)
def test_nothing_of_the_future_or_of_other_documents_is_selected(
    layout: str, num_docs: int, selections: SyntheticSelections
) -> None:
    starts = [0, 65536] if num_docs == 1 else [0, 12800, 40960, 65536]
    placement = place(layout, seq_len=65536, block_size=128, cp_size=8, cu_seqlens=starts)
    for rank in range(8):
        needed = selections.needed(placement, rank)
        own = np.zeros(512, dtype=bool)
        own[placement.order[rank]] = True
        assert not (needed & ~(placement.visible(rank) | own)).any()
        assert needed[:, own].all()
        # the first block of every document that a query sees
        assert needed[:, np.unique(placement.doc_start[own])].all()


def test_stated_f_is_what_comes_out() -> None:
    placement = place("contiguous", seq_len=2**18, block_size=128, cp_size=16)
    for f in (0.0, 0.05, 0.2, 0.5):
        assert collect_wants(stated(f), placement, 4, 1).f == pytest.approx(f, abs=5e-4)
    with pytest.raises(ValueError, match=r"f=0.6: with this layout .* a rank may see 0.500"):
        stated(0.6).check(placement)


def test_runs_do_not_depend_on_the_ranks() -> None:
    """What queries select is a property of the queries: 4 ranks together need what 16 need."""
    selections = alike(256, seed=5)
    few, many = (place("contiguous", seq_len=65536, block_size=128, cp_size=n) for n in (4, 16))
    for rank in range(4):
        union = np.any([selections.needed(many, 4 * rank + i) for i in range(4)], axis=0)
        own = np.isin(np.arange(512), few.order[rank])
        assert np.array_equal(union & ~own, selections.needed(few, rank) & ~own)
    again, other = alike(256, seed=5).needed(few, 3), alike(256, seed=6).needed(few, 3)
    assert np.array_equal(again, selections.needed(few, 3))
    assert not np.array_equal(again, other)


def test_agreement_and_nearness_lower_f() -> None:
    placement = place("contiguous", seq_len=2**18, block_size=128, cp_size=16)

    def f(selections: SyntheticSelections) -> float:
        return collect_wants(selections, placement, 4, 1).f

    assert f(alike(32)) > f(alike(128)) > f(alike(1024))
    assert f(alike(128, distance_exponent=0.0)) > f(alike(128)) > f(alike(128, distance_exponent=2.0))
    scattered = f(alike(128, popular_share=0.0, distance_exponent=0.0))
    assert scattered > f(alike(128, popular_share=0.9, popular_exponent=1.3, distance_exponent=0.0))
    near = alike(128, distance_exponent=2.0).local_share(placement).mean()
    assert near > alike(128, distance_exponent=0.0).local_share(placement).mean()


def test_uniform_picks_cover_what_probability_says() -> None:
    """15 of B blocks drawn by n independent runs leave (1 - 1 / before) ** picks of the blocks out."""
    selections = alike(128, sink_blocks=0, popular_share=0.0, distance_exponent=0.0)
    placement = place("contiguous", seq_len=2**19, block_size=128, cp_size=2)
    needed = selections.needed(placement, 1)[:, :2048]
    runs = np.arange(2048, 4096)
    missed = np.exp((15 * np.log1p(-1 / runs)).sum())
    assert needed.mean() == pytest.approx(1 - missed, abs=2e-3)


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="f, alike_tokens: exactly one"):
        SyntheticSelections(num_kv_heads=4, topk=16)
    with pytest.raises(ValueError, match="sink_blocks=16: must be from 0 to topk - local_blocks = 15"):
        stated(0.1, sink_blocks=16)
    with pytest.raises(ValueError, match=r"popular_share=1.5: must be from 0 to 1"):
        stated(0.1, popular_share=1.5)
    with pytest.raises(
        ValueError, match="alike_tokens=96: must be a multiple or a divisor of block_size=128"
    ):
        alike(96).check(place("contiguous", seq_len=65536, block_size=128, cp_size=2))
