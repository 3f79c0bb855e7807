"""The whole step, context and expert parallel, equals one process in fp64: guards every change.

Layers with full attention, MSA and a sliding window. Loss, KL, every gradient, the block selection and the
expert bias of two training steps, for every exchange and layout, and every setting of the exchange. Packs:
one long document; many short ones; one shorter than a block; one with nothing remote. The one process takes
the plain definitions (`attention.kernel=reference`), all others what `auto` is on a CPU, or what they name.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.config import (
    StageAttention,
)
from msa_train.model.layers import offload
from msa_train.parallel.kv_exchange import plan as exchange_plan
from msa_train.parallel.kv_exchange.slices import last_call
from msa_train.parallel.sharding.load_balance import balance, causal_work, index_work
from msa_train.parallel.sharding.partition import SequencePartition, common, contiguous_plan, count
from msa_train.training.metrics.collect import kv_bytes_all_gather
from tests.helpers.compare import assert_rows_close
from tests.helpers.exactness_cases import CASES, REFERENCES
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import SEQ_LEN, run_steps, small_config, step_packs
from tests.helpers.spawn import run_ranks

TOLERANCE = 1e-8


def worker(rank: int, world_size: int, cases: dict[str, dict[str, Any]], folder: str) -> None:
    """All cases of one world size, one process group start for all of them."""

    # Nodes of two ranks are too few for a broadcast to pay.
    exchange_plan.HOT_COST = -math.inf
    # Everything here is smaller than what is worth a copy.
    offload.MIN_BYTES = 0
    for name, arguments in cases.items():
        # Rates of this machine would decide.
        last_call.SELECTED_PAYS = -1.0 if "gathers" in name else math.inf
        torch.save(run_steps(small_config(**arguments)), f"{folder}/{name}.{rank}")
        leave_groups()


def run_cases(
    names: Iterable[str], folder: Path, device: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """What every rank saw of each of these cases; device: of the ranks, see `run_ranks`."""
    chosen = {name: CASES[name] for name in names}
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in sorted({case.world_size for case in chosen.values()}):
        cases = {name: case.settings for name, case in chosen.items() if case.world_size == world_size}
        run_ranks(world_size, worker, cases, str(folder), device=device)
        for name in cases:
            found[name] = [
                torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(world_size)
            ]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_cases(CASES, tmp_path_factory.mktemp("exactness"))


def reference_of(name: str) -> str:
    """The single process that a case must equal."""
    return REFERENCES[next(kind for kind in ("-dense", "-warm", "-soft", "") if kind in name)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFERENCES.values()])
def test_equals_one_process(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    reference = results[reference_of(name)][0]["steps"]
    experts_seen, tokens_seen = set(), 0
    for rank in results[name]:
        for step, (got, want) in enumerate(zip(rank["steps"], reference, strict=True)):
            where = f"{name}, rank {rank['rank']}, step {step}"
            assert abs(got["loss"] - want["loss"]) <= TOLERANCE * want["loss"], where
            assert abs(got["grad_norm"] - want["grad_norm"]) <= TOLERANCE * want["grad_norm"], where
            assert got["kl"].keys() == want["kl"].keys() == {2, 4}
            for layer, kl in want["kl"].items():
                assert abs(got["kl"][layer] - kl) <= TOLERANCE * kl, where
            for parameter, gradient in got["gradients"].items():
                assert want["gradients"][parameter].abs().max() > 0 or "expert" in parameter, parameter
                assert_rows_close(gradient, want["gradients"][parameter], TOLERANCE)
            experts_seen |= got["gradients"].keys()
            for key, block_indices in got["selections"].items():
                rows = got["positions"][key[0]]
                groups = slice(got["first_group"], got["first_group"] + block_indices.shape[1])
                assert torch.equal(block_indices, want["selections"][key][rows, groups]), f"{where}, {key}"
                tokens_seen += block_indices.shape[:2].numel()
            assert got["attention"].keys() == want["attention"].keys() == {2, 4}
            for layer, sums in want["attention"].items():
                assert (sums[:, 0] > 0).all()
                assert_rows_close(got["attention"][layer], sums, TOLERANCE)
            for ours, theirs in zip(got["expert_bias"], want["expert_bias"], strict=True):
                assert torch.equal(ours, theirs), where
    # The ranks together must have shown every parameter and every token's selection.
    assert experts_seen == reference[0]["gradients"].keys()
    whole = sum(x.shape[:2].numel() for step in reference for x in step["selections"].values())
    assert tokens_seen == whole


@pytest.mark.parametrize("name", ["cp4-selected-ep4-again", "cp4-selected-ep4-waiting"])
def test_two_runs_are_equal_bit_for_bit(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Once more the same, and without computing under the wire: order of arrival decides nothing."""
    for got, want in zip(results[name], results["cp4-selected-ep4"], strict=True):
        for ours, theirs in zip(got["steps"], want["steps"], strict=True):
            assert (ours["loss"], ours["kl"]) == (theirs["loss"], theirs["kl"])
            assert ours["traffic"] == theirs["traffic"]
            for parameter, gradient in ours["gradients"].items():
                assert torch.equal(gradient, theirs["gradients"][parameter]), parameter


@pytest.mark.parametrize("name", ["again", "waiting"])
def test_slices_repeat_bit_for_bit(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    same_bits(results[f"cp4-selected-slices-{name}"], results["cp4-selected-slices"])


def test_slices_have_the_bits_of_one_piece(results: dict[str, list[dict[str, Any]]]) -> None:
    """What is fetched slice by slice stands where one exchange puts it; only requests are more."""
    same_bits(results["cp3-selected-plain-slices"], results["cp3-selected-plain"], requests=False)


def same_bits(got: list[dict[str, Any]], want: list[dict[str, Any]], *, requests: bool = True) -> None:
    for one, other in zip(got, want, strict=True):
        for ours, theirs in zip(one["steps"], other["steps"], strict=True):
            assert (ours["loss"], ours["kl"]) == (theirs["loss"], theirs["kl"])
            for purpose in ours["traffic"].keys() | theirs["traffic"].keys():
                if requests or purpose != "request":
                    assert ours["traffic"].get(purpose) == theirs["traffic"].get(purpose), purpose
            for parameter, gradient in ours["gradients"].items():
                assert torch.equal(gradient, theirs["gradients"][parameter]), parameter


def test_hot_pairs_and_nodes_send_less(results: dict[str, list[dict[str, Any]]]) -> None:
    """Received in the first step by all ranks; the plan's own tests count pairs."""

    def received(name: str, purpose: str) -> int:
        return sum(rank["steps"][0]["traffic"].get(purpose, 0) for rank in results[name])

    plain, hot, nodes = "cp4-selected-ep1", "cp4-selected-ep2", "cp4-selected-ep4"
    assert received(hot, "kv_hot") > 0
    assert 0 < received(hot, "kv") < received(plain, "kv")
    assert received(nodes, "kv_hot") > 0
    # Pairs from the other node arrive once per node, then go on to whoever wants them.
    assert 0 < received(nodes, "kv_outer") < received(nodes, "kv")
    assert received(plain, "kv_again") == received(hot, "kv_again") == 0
    # Fetched again as it was fetched: nothing but own pairs was kept.
    again = "cp3-selected-soft"
    assert received(again, "kv_again") == received(again, "kv") > 0
    assert received(again, "full_kv_again") == received(again, "full_kv") > 0
    assert received(plain, "full_kv_again") == 0 < received(plain, "full_kv")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("cp3-selected-ep1", "cp3-selected-ep1-again"),
        ("cp3-selected-ep1", "cp3-selected-ep1-unmoved"),
        ("cp3-ring-warm", "cp3-ring-warm-again"),
    ],
)
def test_equal_bit_by_bit(name: str, other: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Runs again; and queries of the selection moved or not, where only the bytes on the wire may differ."""
    for ours, theirs in zip(results[name], results[other], strict=True):
        for first, second in zip(ours["steps"], theirs["steps"], strict=True):
            assert (first["loss"], first["kl"]) == (second["loss"], second["kl"])
            for parameter, gradient in first["gradients"].items():
                assert torch.equal(gradient, second["gradients"][parameter]), parameter
            for key, block_indices in first["selections"].items():
                assert torch.equal(block_indices, second["selections"][key])
    moved = [sum(step["traffic"].get("index_query", 0) for step in rank["steps"]) for rank in results[other]]
    assert any(moved) == (other == "cp3-selected-ep1-again")


def remote_window_blocks(step: int, own: range) -> int:
    """Blocks that the window layer needs from other ranks, over a step's packs, token by token."""
    config = small_config().attention
    count = 0
    for pack in step_packs()[step]:
        seen = set()
        for start, length in zip(pack.cu_seqlens[:-1].tolist(), pack.doc_lengths.tolist(), strict=True):
            for query in range(start, start + length):
                if query // config.block_size in own:
                    tokens = [*range(start, start + config.window_sink * config.block_size)]
                    tokens += range(query - config.window + 1, query + 1)
                    seen |= {token // config.block_size for token in tokens if start <= token <= query}
        count += len(seen - set(own))
    return count


def test_exchange_sends_only_what_was_selected(results: dict[str, list[dict[str, Any]]]) -> None:
    """Bytes from the collectives, against a brute-force count of distinct remote (block, group) pairs.

    The window layer's are counted from positions, the same for its three groups.
    """
    for name in ("cp2-selected-ep1", "cp3-selected-ep1", "cp4-selected-ep1"):
        cp_size, head_dim, block_size, element = CASES[name].settings.get("cp_size", 1), 8, 4, 8
        local_blocks = 96 // cp_size // block_size
        for rank in results[name]:
            for number, step in enumerate(rank["steps"]):
                start = int(step["positions"][0][0])
                own = range(start // block_size, start // block_size + local_blocks)
                pairs = 0
                for block_indices in step["selections"].values():
                    for group in range(block_indices.shape[1]):
                        seen = {b for row in block_indices[:, group].tolist() for b in row}
                        pairs += len([b for b in seen if b >= 0 and b not in own])
                pairs += 3 * remote_window_blocks(number, own)
                assert step["traffic"]["kv"] == pairs * 2 * head_dim * block_size * element
    # The second step's packs have nothing remote but what the 50-token document needs: some rank gets none.
    quiet = [rank["steps"][1]["traffic"]["kv"] for rank in results["cp4-selected-ep1"]]
    assert 0 in quiet
    assert max(quiet) > 0


def test_gathering_exchanges_move_everything(results: dict[str, list[dict[str, Any]]]) -> None:
    """All-gather and ring: (P - 1) shards per msa or swa layer and pack, whatever was selected.

    With Ulysses groups of 3, P is 3 times smaller and a shard 3 times longer, of a third of the groups.
    """
    for name in ("cp2-all_gather-ep1", "cp4-ring-ep1", "cp6-all_gather-heads3"):
        head_size = CASES[name].settings.get("head_size", 1)
        cp_size = CASES[name].settings.get("cp_size", 1) // head_size
        shard = 96 // cp_size * 2 * 3 // head_size * 8 * 8
        layers_and_packs = 3 * 2
        for rank in results[name]:
            for step in rank["steps"]:
                assert step["traffic"]["kv"] == (cp_size - 1) * shard * layers_and_packs
        moved = sum(rank["steps"][0]["traffic"]["kv"] for rank in results[name])
        config = small_config(cp_size=CASES[name].settings.get("cp_size", 1), head_size=head_size)
        assert moved == kv_bytes_all_gather(config, num_packs=2, seq_len=SEQ_LEN)
    # In a dense stage only the window layer exchanges blocks.
    moved = sum(rank["steps"][0]["traffic"]["kv"] for rank in results["cp3-ring-warm"])
    config = small_config(cp_size=3)
    assert moved == kv_bytes_all_gather(config, 2, SEQ_LEN, StageAttention.dense) > 0


def test_moved_queries_are_counted(results: dict[str, list[dict[str, Any]]]) -> None:
    """Two MSA layers move index queries (fp64) and ids (int32), one full layer queries and outputs."""
    config = small_config().attention
    for name in ("cp2-selected-ep1", "cp3-all_gather-ep1", "cp2-ring-recompute"):
        cp_size = CASES[name].settings.get("cp_size", 1)
        for number, packs in enumerate(step_packs()):
            index, full = 0, 0
            for pack in packs:
                starts, lengths = pack.cu_seqlens.tolist(), pack.doc_lengths.tolist()
                home = contiguous_plan(SEQ_LEN, cp_size)
                index += moved(home, balance(home, *index_work(starts, config.block_size)))
                full += moved(home, balance(home, *causal_work(starts, lengths, config.block_size)))
            if "balance" in CASES[name].settings:
                index = full = 0
            traffic = [rank["steps"][number]["traffic"] for rank in results[name]]
            assert _total(traffic, "index_query") == 2 * index * 3 * (6 * 8 + config.topk * 4)
            assert _total(traffic, "full_query") == full * 2 * 6 * 8 * 8
            assert _total(traffic, "full_query_grad") == _total(traffic, "full_query")


def moved(home: SequencePartition, away: SequencePartition) -> int:
    """Tokens of other ranks than before."""
    return SEQ_LEN - sum(count(common(a, b)) for a, b in zip(home.ranges, away.ranges, strict=True))


def _total(traffic: list[dict[str, int]], purpose: str) -> int:
    return sum(of_rank.get(purpose, 0) for of_rank in traffic)
