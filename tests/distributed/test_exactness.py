"""The whole step, context and expert parallel, equals one process in fp64: guards every change.

Layers with full attention, MSA and a sliding window. Loss, KL, every gradient, the block selection and the
expert bias of two training steps, for every exchange and layout, and every setting of the exchange. Packs:
one long document; many short ones; one shorter than a block; one with nothing remote.
"""

import math
from typing import Any

import pytest
import torch

from msa_train.config import ExchangeConfig, KvExchange, Recompute, StageAttention, StageConfig
from msa_train.parallel import exchange_plan
from msa_train.training.step_metrics import kv_bytes_all_gather
from tests.helpers.compare import assert_rows_close
from tests.helpers.model_runs import SEQ_LEN, run_steps, small_config, step_packs
from tests.helpers.spawn import run_ranks

TOLERANCE = 1e-8
EXCHANGES = [KvExchange.selected, KvExchange.all_gather, KvExchange.ring]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    f"cp{cp}-{exchange.value}-ep{ep}": (
        # Expert parallelism of 2 needs an even number of ranks.
        cp * (2 if cp * 1 % ep else 1),
        {"cp_size": cp, "ep_size": ep, "exchange": exchange},
    )
    for cp in (1, 2, 3, 4)
    for exchange in EXCHANGES
    for ep in (1, 2)
}
CASES |= {
    f"cp2-{exchange.value}-recompute": (
        2,
        {"cp_size": 2, "exchange": exchange, "recompute": Recompute.full},
    )
    for exchange in EXCHANGES
}
CASES["cp4-selected-ep4"] = (4, {"cp_size": 4, "ep_size": 4})
CASES["cp2-selected-ep4-dp2"] = (4, {"cp_size": 2, "ep_size": 4})
DENSE = StageConfig(attention=StageAttention.dense)
WARM = {"stage": DENSE, "temperature": 1.5}
# What each case is compared with: one process in the same kind of stage.
REFERENCES = {"": "cp1-selected-ep1", "-dense": "cp1-dense", "-warm": "cp1-warm", "-soft": "cp1-soft"}
CASES |= {
    f"cp{cp}-{exchange.value}-{kind}": (cp, {"cp_size": cp, "exchange": exchange, **arguments})
    for kind, arguments in (("dense", {"stage": DENSE}), ("warm", WARM), ("soft", {"temperature": 1.5}))
    for cp in (2, 3)
    for exchange in EXCHANGES
}
CASES["cp1-dense"], CASES["cp1-warm"] = (1, {"stage": DENSE}), (1, WARM)
CASES["cp1-soft"] = (1, {"temperature": 1.5})
CASES["cp2-selected-ep2-recompute-warm"] = (
    2,
    {"cp_size": 2, "ep_size": 2, "recompute": Recompute.full, **WARM},
)
# Settings of the exchange, in the place of none.
HOT, NODES = ExchangeConfig(), ExchangeConfig(ranks_per_node=2)
AGAIN = ExchangeConfig(keep_for_backward=False, hot_share=0.0)
WAITING = ExchangeConfig(ranks_per_node=2, overlap=False)
for name, settings in (
    ("cp4-selected-ep2", HOT),
    ("cp4-selected-ep4", NODES),
    ("cp2-selected-recompute", AGAIN),
    ("cp3-selected-soft", AGAIN),
):
    CASES[name][1]["settings"] = settings
AUTO = {"exchange": KvExchange.auto}
CASES |= {
    "cp4-selected-ep4-again": (4, {"cp_size": 4, "ep_size": 4, "settings": NODES}),
    "cp4-selected-ep4-waiting": (4, {"cp_size": 4, "ep_size": 4, "settings": WAITING}),
    "cp4-hot-again-recompute": (
        4,
        {
            "cp_size": 4,
            "recompute": Recompute.full,
            "settings": ExchangeConfig(keep_for_backward=False, ranks_per_node=2),
        },
    ),
    "cp4-auto-nodes": (4, {"cp_size": 4, **AUTO, "settings": NODES}),
    "cp2-auto-recompute-warm": (2, {"cp_size": 2, **AUTO, "recompute": Recompute.full, **WARM}),
}


def worker(rank: int, world_size: int, cases: dict[str, dict[str, Any]], folder: str) -> None:
    """All cases of one world size, one process group start for all of them."""
    from megatron.core import parallel_state

    # Nodes of two ranks are too few for a broadcast to pay.
    exchange_plan.HOT_COST = -math.inf
    for name, arguments in cases.items():
        torch.save(run_steps(small_config(**arguments)), f"{folder}/{name}.{rank}")
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("exactness")
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in sorted({size for size, _ in CASES.values()}):
        cases = {name: arguments for name, (size, arguments) in CASES.items() if size == world_size}
        run_ranks(world_size, worker, cases, str(folder))
        for name in cases:
            found[name] = [
                torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(world_size)
            ]
    return found


def reference_of(name: str) -> str:
    """The single process that a case must equal."""
    return REFERENCES[next(kind for kind in ("-dense", "-warm", "-soft", "") if name.endswith(kind))]


def is_data_parallel(name: str) -> bool:
    """Whether the packs of a step are dealt."""
    world_size, arguments = CASES[name]
    return world_size > arguments.get("cp_size", 1)


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
                rows = slice(got["start"], got["start"] + block_indices.shape[0])
                assert torch.equal(block_indices, want["selections"][key][rows]), f"{where}, {key}"
                tokens_seen += block_indices.shape[0]
            assert got["attention"].keys() == want["attention"].keys() == {2, 4}
            for layer, sums in want["attention"].items():
                assert (sums[:, 0] > 0).all()
                if is_data_parallel(name):
                    # Every data-parallel rank looks at a pack of its own.
                    assert (got["attention"][layer][:, 0] >= sums[:, 0] + (step == 0)).all(), where
                else:
                    assert_rows_close(got["attention"][layer], sums, TOLERANCE)
            for ours, theirs in zip(got["expert_bias"], want["expert_bias"], strict=True):
                assert torch.equal(ours, theirs), where
    # The ranks together must have shown every parameter and every token's selection.
    assert experts_seen == reference[0]["gradients"].keys()
    whole = sum(x.shape[0] for step in reference for x in step["selections"].values())
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
        cp_size, head_dim, block_size, element = CASES[name][1]["cp_size"], 8, 4, 8
        local_blocks = 96 // cp_size // block_size
        for rank in results[name]:
            for number, step in enumerate(rank["steps"]):
                own = range(step["start"] // block_size, step["start"] // block_size + local_blocks)
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
    """All-gather and ring: (P - 1) shards per msa or swa layer and pack, whatever was selected."""
    for name in ("cp2-all_gather-ep1", "cp4-ring-ep1"):
        cp_size = CASES[name][1]["cp_size"]
        shard = 96 // cp_size * 2 * 3 * 8 * 8
        layers_and_packs = 3 * 2
        for rank in results[name]:
            for step in rank["steps"]:
                assert step["traffic"]["kv"] == (cp_size - 1) * shard * layers_and_packs
        moved = sum(rank["steps"][0]["traffic"]["kv"] for rank in results[name])
        assert moved == kv_bytes_all_gather(small_config(cp_size=cp_size), num_packs=2, seq_len=SEQ_LEN)
    # In a dense stage only the window layer exchanges blocks.
    moved = sum(rank["steps"][0]["traffic"]["kv"] for rank in results["cp3-ring-warm"])
    config = small_config(cp_size=3)
    assert moved == kv_bytes_all_gather(config, 2, SEQ_LEN, StageAttention.dense) > 0
