"""The simulator's bytes are those that training's collectives count, purpose by purpose and rank by rank."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from msa_kernels import select_blocks
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.comm.topology import build_comm
from msa_train.parallel.kv_exchange import plan as exchange_plan
from msa_train.parallel.selection_file import SelectionRecorder
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.simulate.inputs.cluster import PRESETS, Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.rates import load_rates
from msa_train.simulate.inputs.scenario import Options, Scenario, Scheme
from msa_train.simulate.selections.recorded import RecordedSelections, read_selections
from msa_train.simulate.study import answer
from tests.helpers.spawn import run_ranks

P, S, BLOCK_SIZE, TOPK, M, G, D, DI, NODE = 4, 256, 4, 3, 2, 2, 8, 5, 2
CU_SEQLENS = [0, 176, 256]
# name -> exchange of training, its settings, scheme of the simulator
CASES: dict[str, tuple[KvExchange, dict[str, object], Scheme]] = {
    "ring": (KvExchange.ring, {}, Scheme.ring),
    "all_gather": (KvExchange.all_gather, {}, Scheme.all_gather),
    "selected": (KvExchange.selected, {"hot_share": 0.0}, Scheme.selected),
    "refetch": (KvExchange.selected, {"hot_share": 0.0, "keep_for_backward": False}, Scheme.selected),
    "hot": (KvExchange.selected, {"hot_share": 0.75}, Scheme.selected),
    "nodes": (KvExchange.selected, {"hot_share": 0.0, "ranks_per_node": NODE}, Scheme.selected_hierarchical),
    "nodes_hot": (
        KvExchange.selected,
        {"hot_share": 0.75, "ranks_per_node": NODE, "keep_for_backward": False},
        Scheme.selected_hierarchical,
    ),
}  # fmt: skip


def selection() -> Tensor:
    """[S, M, TOPK] by random scores."""
    generator = torch.Generator().manual_seed(3)
    q_index = torch.randn(S, M, DI, generator=generator)
    k_index = torch.randn(S, DI, generator=generator)
    return select_blocks(q_index, k_index, torch.tensor(CU_SEQLENS), block_size=BLOCK_SIZE, topk=TOPK)


def constructed(f: float) -> Tensor:
    """[S, M, TOPK]: own block, block 0 of the pack, which is hot thereby, and some others."""
    rng = np.random.default_rng(7)
    own = np.arange(S) // BLOCK_SIZE
    blocks = rng.integers(1, max(2, int(f * S // BLOCK_SIZE)), (S, M))
    picks = np.stack((np.broadcast_to(own[:, None], (S, M)), np.zeros((S, M)), blocks), axis=-1).astype(
        np.int32
    )
    picks[..., 1:][picks[..., 1:] == picks[..., :1]] = -1
    return torch.from_numpy(picks)


SELECTIONS = {"scored": selection, "constructed": lambda: constructed(0.6)}


def count_traffic(rank: int, size: int, block_indices: Tensor) -> dict[str, dict[str, int]]:
    """Bytes that this rank received in one layer call of every case, by purpose."""
    layout = ShardLayout(seq_len=S, block_size=BLOCK_SIZE, cp_rank=rank, cp_size=size)
    rows = slice(*layout.ranges[0])
    # a broadcast wherever it spares the busiest rank anything, here as in the test below
    exchange_plan.HOT_COST = 0.0
    generator = torch.Generator().manual_seed(rank)
    counted = {}
    for name, (exchange, settings, _) in CASES.items():
        config = ExchangeConfig(**settings)  # type: ignore[arg-type]
        comm = build_comm(dist.group.WORLD, exchange, config, torch.device("cpu"), 60.0).kv  # type: ignore[arg-type]
        T = layout.local_seq_len
        shapes = ((T, M, G, D), (T, M, D), (T, M, D), (T, M, DI), (T, DI))
        q, k, v, q_index, k_index = (
            torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes
        )
        before: dict[str, int] = {}
        # In a first call of a size ranks also introduce themselves; the second is like all others.
        for _ in range(2):
            before = dict(comm.counters.traffic.received)
            keys = comm.all_gather(k_index.detach(), "index_key").flatten(0, 1)
            call = SparseAttentionArgs(
                block_indices=block_indices[rows],
                position=torch.arange(*layout.ranges[0]),
                layout=layout,
                comm=comm,
                exchange=exchange,
                softmax_scale=1.0,
                k_index=keys.view(-1, BLOCK_SIZE, DI),
                kl_weight=1.0,
                settings=config,
            )
            cp_sparse_attention(q, k, v, q_index, k_index, call)[0].sum().backward()
        counted[name] = {
            key: n - before.get(key, 0)
            for key, n in comm.counters.traffic.received.items()
            if key != "request_shape"
        }
    return counted


def count_all(rank: int, size: int) -> dict[str, dict[str, dict[str, int]]]:
    """`count_traffic` of every selection."""
    return {name: count_traffic(rank, size, make()) for name, make in SELECTIONS.items()}


def recorded(block_indices: Tensor, tmp_path: Path) -> RecordedSelections:
    """The selection as each rank would record it, read back."""
    for rank in range(P):
        T = S // P
        recorder = SelectionRecorder(
            seq_len=S, block_size=BLOCK_SIZE, num_kv_heads=M, topk=TOPK, first_token=rank * T, num_tokens=T,
            chunk_tokens=BLOCK_SIZE, cu_seqlens=CU_SEQLENS,
        )  # fmt: skip
        recorder.add(1, block_indices[rank * T : (rank + 1) * T].numpy())
        recorder.save(tmp_path / f"rank{rank}.npz", "test")
    (layer,) = read_selections(tmp_path)
    return layer


def cluster(node_size: int) -> Cluster:
    h100 = PRESETS["h100"]
    return Cluster(
        name="test",
        gpus_per_node=node_size,
        node_rate_bytes=h100.node_rate_bytes,
        network_rate_bytes=h100.network_rate_bytes,
        node_latency_s=0,
        network_latency_s=0,
        host_sync_s=0,
    )


@pytest.fixture(scope="module")
def counted() -> list[dict[str, dict[str, dict[str, int]]]]:
    """By rank, selection and case."""
    return run_ranks(P, count_all)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_bytes_equal_the_counters_of_training(
    name: str,
    case: str,
    counted: list[dict[str, dict[str, dict[str, int]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange_plan, "HOT_COST", 0.0)
    block_indices = SELECTIONS[name]()
    _, settings, scheme = CASES[case]
    scenario = Scenario(
        shape=LayerShape(
            hidden_size=16, num_heads=M * G, num_kv_heads=M, head_dim=D, index_head_dim=DI,
            block_size=BLOCK_SIZE,
            topk=TOPK, element_bytes=4,
        ),
        cluster=cluster(NODE if settings.get("ranks_per_node") else P),
        rates=load_rates("h100_assumed"),
        seq_len=S,
        cp_size=P,
        cu_seqlens=CU_SEQLENS,
        schemes=[scheme],
        full_schemes=[],
        options=Options(
            hot_share=float(settings.get("hot_share", 0.75)),  # type: ignore[arg-type]
            keep_for_backward=bool(settings.get("keep_for_backward", True)),
        ),
        index_balance=False,
    )  # fmt: skip
    report = answer(scenario, recorded(block_indices, tmp_path)).msa[scheme.value]
    predicted = [
        {name: round(sum(w.received[rank] for w in parts)) for name, parts in report.traffic.items()}
        for rank in range(P)
    ]
    assert any(rank["kv"] for rank in predicted)
    if "hot" in case and name == "constructed":
        assert any(rank["kv_hot"] for rank in predicted), "block 0 is wanted by all"
    assert predicted == [of_rank[name][case] for of_rank in counted]
