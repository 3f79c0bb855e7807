"""A rank that dies, stalls or asks for what does not fit: all others end soon, naming layer, point and rank.

Each scene is a small job of its own; all of them run at once, as each must lose a rank.
"""

import math
import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.comm.rank_faults import ExchangeError
from msa_train.parallel.comm.topology import build_comm
from msa_train.parallel.kv_exchange import plan as exchange_plan
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes
from msa_train.parallel.kv_exchange.requests import ExchangeTerms, exchange_requests
from msa_train.parallel.sharding.shard_layout import ShardLayout
from tests.helpers import fork_server
from tests.helpers.spawn import run_ranks

LAYER, VICTIM = 7, 1
# Stalled ranks are noticed after the first time, on cores that all scenes share; all scenes must be over well
# before the second one.
TIMEOUT_S, DEADLINE_S = 10.0, 120.0
M, G, D, DI, BLOCK_SIZE, NL = 2, 2, 4, 3, 2, 2


@dataclass(frozen=True)
class Scene:
    """How rank 1 is lost, and before which collective; nodes: 4 ranks on two nodes, with hot pairs."""

    point: str
    signal: signal.Signals
    nodes: bool = False

    @property
    def name(self) -> str:
        return f"{self.signal.name}-{self.point}"

    @property
    def size(self) -> int:
        return 4 if self.nodes else 3


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FLAT = ("index_key", "request", "kv", "kv_again", "kv_grad")
NODES = ("kv_outer", "kv_hot", "kv_grad_outer", "kv_grad_hot")
SCENES = [
    *(Scene(point, how) for how in (KILL, STOP) for point in FLAT),
    *(Scene(point, KILL, True) for point in NODES),
    Scene("kv_outer", STOP, True),
]


class LosingComm(CpComm):
    """Ends or stops its process before a collective of some purpose."""

    scene: ClassVar[Scene | None] = None

    def _announce(self, purpose: str, num_bytes: int) -> None:
        super()._announce(purpose, num_bytes)
        scene = LosingComm.scene
        if scene is not None and dist.get_rank() == VICTIM and purpose == scene.point:
            os.kill(os.getpid(), scene.signal)


class LosingKvComm(LosingComm, KvComm):
    """The same with nodes."""


def selection(rank: int, size: int) -> Tensor:
    """[T, M, 4]: own block, block 0 and one block of every third of the earlier ranks."""
    first = torch.arange(NL * BLOCK_SIZE) // BLOCK_SIZE + rank * NL
    others = [0 if rank else -1, *(owner * NL + 1 if owner < rank else -1 for owner in range(size - 1))]
    rows = torch.tensor(others).expand(first.shape[0], -1)
    return torch.cat((first[:, None], rows), 1)[:, None].expand(-1, M, -1).contiguous()


def run_layer(comm: KvComm, settings: ExchangeConfig, *, poison: str = "", seq_blocks: int = 0) -> Tensor:
    """One MSA layer, forward and backward, of small random tensors; its output."""
    rank, size = comm.rank, comm.size
    layout = ShardLayout(
        seq_len=(seq_blocks or size * NL) * BLOCK_SIZE, block_size=BLOCK_SIZE, cp_rank=rank, cp_size=size
    )
    generator, T = torch.Generator().manual_seed(rank), layout.local_seq_len
    q, q_index = torch.randn(T, M, G, D, generator=generator), torch.randn(T, M, DI, generator=generator)
    k, v, k_index = (torch.randn(T, *shape, generator=generator) for shape in ((M, D), (M, D), (DI,)))
    if poison:
        {"k": k, "v": v, "k_index": k_index}[poison][1] = float("nan" if poison == "k" else "inf")
    all_keys = comm.all_gather(k_index, "index_key").flatten(0, 1)
    call = SparseAttentionArgs(
        block_indices=selection(rank, size)[:T],
        position=torch.arange(*layout.ranges[0]),
        layout=layout,
        comm=comm,
        exchange=KvExchange.selected,
        softmax_scale=0.5,
        k_index=all_keys.view(-1, BLOCK_SIZE, DI),
        kl_weight=0.1,
        settings=settings,
    )
    tensors = [x.requires_grad_() for x in (q, k, v, q_index, k_index)]
    out, _ = cp_sparse_attention(*tensors, call)
    out.sum().backward()
    return out.detach()


def losing_comm(scene: Scene) -> tuple[KvComm, ExchangeConfig]:
    assert dist.group.WORLD is not None
    settings = ExchangeConfig(
        keep_for_backward=scene.point != "kv_again", ranks_per_node=2 if scene.nodes else 0
    )
    comm = build_comm(dist.group.WORLD, KvExchange.selected, settings, torch.device("cpu"), TIMEOUT_S).kv
    for part in ("inner", "outer"):
        if (nodes := getattr(comm, part)) is not None:
            setattr(comm, part, LosingComm(**_fields(nodes)))
    return LosingKvComm(**_fields(comm)), settings


def _fields(comm: CpComm) -> dict[str, Any]:
    return {item.name: getattr(comm, item.name) for item in fields(comm)}


def scene_rank(rank: int, scene: Scene, folder: str) -> None:
    """One rank of a scene: writes the error that it ends with."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=scene.size,
        timeout=timedelta(seconds=10 * TIMEOUT_S),
    )  # fmt: skip
    exchange_plan.HOT_COST = -math.inf
    comm, settings = losing_comm(scene)
    comm.all_gather(torch.zeros(1), "calibration")
    LosingComm.scene = scene
    text = "no error"
    try:
        run_layer(comm.for_layer(LAYER), settings)
        # Who needed nothing of the lost rank meets it here.
        run_layer(comm.for_layer(LAYER + 1), settings)
    except ExchangeError as error:
        text = str(error)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    partial = Path(folder) / f".{rank}"
    partial.write_text(text)
    partial.rename(Path(folder) / f"error_{rank}")
    os._exit(0)


def play(folders: dict[str, str]) -> None:
    """Forks all ranks of all scenes, so that modules are imported once; ends all of them."""
    torch.set_num_threads(1)
    context, ranks = multiprocessing.get_context("fork"), dict[tuple[str, int], BaseProcess]()
    try:
        for scene in SCENES:
            for rank in range(scene.size):
                process = context.Process(target=scene_rank, args=(rank, scene, folders[scene.name]))
                process.start()
                ranks[scene.name, rank] = process
        deadline = time.monotonic() + DEADLINE_S
        for (_, rank), process in ranks.items():
            if rank != VICTIM:
                process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in ranks.values():
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """Text of each surviving rank by scene."""
    usable = fork_server.is_usable()
    context: Any = fork_server.context() if usable else multiprocessing.get_context("spawn")
    folders = {scene.name: tmp_path_factory.mktemp(scene.name) for scene in SCENES}
    director = context.Process(target=play, args=({name: str(path) for name, path in folders.items()},))
    director.start()
    director.join()
    assert director.exitcode == 0
    return {
        name: {int(path.name[-1]): path.read_text() for path in folder.glob("error_*")}
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_others_end_and_name_the_lost_rank(scene: Scene, errors: dict[str, dict[int, str]]) -> None:
    survivors = errors[scene.name]
    assert sorted(survivors) == [rank for rank in range(scene.size) if rank != VICTIM], "a rank hung"
    for rank, text in survivors.items():
        assert f"rank {rank} lost the others" in text
        assert f": rank {VICTIM} does not answer and is dead or stalled; " in text, text
        assert "\n" not in text
    # What is on the wire together is waited for one after the other.
    together = (
        rf"layer {LAYER}, .*\({scene.point.removesuffix('_outer').removesuffix('_hot')}(_outer|_hot)?\)"
    )
    assert any(re.match(together, text) for text in survivors.values()), survivors


def refused(rank: int, world_size: int) -> list[str]:
    """What this rank is told about requests of rank 1 that do not fit, and about its bad values."""
    assert dist.group.WORLD is not None
    settings = ExchangeConfig()
    comm = build_comm(dist.group.WORLD, KvExchange.selected, settings, torch.device("cpu"), 20.0).kv
    odd = rank == VICTIM
    texts = []
    layout = ShardLayout(seq_len=12 + 300 * odd, block_size=2, cp_rank=rank, cp_size=world_size)
    needed = torch.zeros(M, layout.num_blocks, dtype=torch.bool)
    terms = ExchangeTerms(KvExchange.selected, settings, KvBlockBytes(1, 1, 1), (None, torch.zeros(1)))
    with pytest.raises(ExchangeError) as caught:
        exchange_requests(needed, layout, comm.for_layer(LAYER), terms)
    texts.append(str(caught.value))
    for poison in ("k", "v", "k_index"):
        told = comm.with_new_counters().for_layer(LAYER)
        assert run_layer(told, settings, poison=poison if odd else "").isnan().all()
        texts += told.counters.bad_values
    with pytest.raises(ExchangeError) as caught:
        run_layer(comm.for_layer(LAYER + odd), settings)
    texts.append(str(caught.value))
    return texts


def test_requests_that_do_not_fit_are_refused_and_bad_values_told_by_all() -> None:
    told = run_ranks(3, refused, timeout_s=60)
    point = "exchanging block requests (request): cp rank 1"
    values = f"layer {LAYER}, {point} has NaN or infinity in its keys or values"
    for rank, texts in enumerate(told):
        assert texts[1:3] == [values, values]
        assert texts[3] == values.replace("keys or values", "index keys")
        at = LAYER + (rank == VICTIM)
        assert texts[4] == f"layer {at}, {point} asks with layer {LAYER + 1}, the others with {LAYER}"
        assert texts[0] == f"layer {LAYER}, {point} asks with blocks per rank 52, the others with 2"
