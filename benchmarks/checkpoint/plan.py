"""Measure what planning a save costs at 256 ranks, with shards of m3 that have no content.

    python -m benchmarks.checkpoint.plan --out benchmarks/results

Lists the shards that each of 256 ranks holds (pp 4, cp 64, ep 64), cuts their shares, plans, and makes the
list of all pieces, as the ranks and rank 0 do. Writes checkpoint_plan.json and checkpoint_plan.md: bytes and
pieces of each rank, CPU seconds and memory of each part. Dense parameters lie one after the other in the
optimizer's buffer here; Megatron's order may be another one.
"""

import argparse
import json
import math
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from benchmarks.machine import ROOT, command, machine
from msa_train.checkpoint.torch_dist.boxes import flat_boxes
from msa_train.checkpoint.torch_dist.safe_pickles import without_collection
from msa_train.checkpoint.torch_dist.shares import holders, own_share, shard_name
from msa_train.checkpoint.torch_dist.staging import tensors_of
from msa_train.checkpoint.torch_dist.writer import Shards, _SavePlanner

LAYERS, HIDDEN, VOCABULARY, EXPERTS, PP, CP = 60, 6144, 200064, 128, 4, 64
WORLD_SIZE = PP * CP
STATES = ("fp32_param", "exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]


def parameters(stage: int) -> tuple[Shapes, Shapes]:
    """List a stage's dense parameters, and its experts' matrices, gate and up apart as they are stored."""
    h, dense, experts = HIDDEN, Shapes(), Shapes()
    if stage == 0:
        dense["embedding.word_embeddings.weight"] = (VOCABULARY, h)
    for layer in range(stage * LAYERS // PP, (stage + 1) * LAYERS // PP):
        name = f"decoder.layers.{layer}"
        dense |= {
            f"{name}.input_layernorm.weight": (h,),
            f"{name}.self_attention.linear_qkv.weight": (72 * 128, h),
            f"{name}.self_attention.linear_proj.weight": (h, 64 * 128),
            f"{name}.self_attention.q_layernorm.weight": (128,),
            f"{name}.self_attention.k_layernorm.weight": (128,),
            f"{name}.pre_mlp_layernorm.weight": (h,),
        }
        if layer < 3:
            dense |= {
                f"{name}.mlp.linear_fc1.weight": (24576, h),
                f"{name}.mlp.linear_fc2.weight": (h, 12288),
            }
            continue
        dense |= {
            f"{name}.self_attention.index_branch.query.weight": (4 * 128, h),
            f"{name}.self_attention.index_branch.key.weight": (128, h),
            f"{name}.self_attention.index_branch.query_norm.weight": (128,),
            f"{name}.self_attention.index_branch.key_norm.weight": (128,),
            f"{name}.mlp.router.weight": (EXPERTS, h),
            f"{name}.mlp.shared_experts.linear_fc1.weight": (6144, h),
            f"{name}.mlp.shared_experts.linear_fc2.weight": (h, 3072),
        }
        experts[f"{name}.mlp.experts.experts.linear_fc1.weight"] = (6144, h)
        experts[f"{name}.mlp.experts.experts.linear_fc2.weight"] = (h, 3072)
    if stage == PP - 1:
        dense |= {"decoder.final_layernorm.weight": (h,), "output_layer.weight": (VOCABULARY, h)}
    return dense, experts


def shards_of(rank: int) -> Shards:
    """List what a rank holds: its stage's bf16 weights, and fp32 state of its experts and its range."""
    place, shards = rank % CP, Shards()
    dense, experts = parameters(rank // CP)
    for key, shape in dense.items():
        add(shards, ShardedTensor.from_rank_offsets(key, empty(shape, torch.bfloat16), replica_id=place))
    for key, shape in experts.items():
        halves = 2 if "fc1" in key else 1
        cut = (shape[0] // halves, shape[1])
        for expert in range(place * EXPERTS // CP, (place + 1) * EXPERTS // CP):
            for half in range(halves):
                offsets = (0, expert, EXPERTS), (1, half, halves)
                for name, dtype in [
                    (key, torch.bfloat16),
                    *((state_key(s, key), torch.float32) for s in STATES),
                ]:
                    data = empty(cut, dtype)
                    add(shards, ShardedTensor.from_rank_offsets(name, data, *offsets, prepend_axis_num=1))
    for key, begin, size in owned(dense, place):
        entry = ShardedTensor.from_rank_offsets(key, empty(dense[key], torch.bfloat16))
        for state in STATES:
            for box in flat_boxes(entry, state_key(state, key), empty((size,), torch.float32), begin):
                add(shards, box)
    return shards


def owned(shapes: Shapes, place: int) -> Iterator[tuple[str, int, int]]:
    """Yield the parameters of a rank's range of all, with first element and number of elements."""
    total = sum(math.prod(shape) for shape in shapes.values())
    first, stop, at = total * place // CP, total * (place + 1) // CP, 0
    for key, shape in shapes.items():
        begin, end = max(first - at, 0), min(stop - at, math.prod(shape))
        if begin < end:
            yield key, begin, end - begin
        at += math.prod(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor without content."""
    return torch.empty(shape, dtype=dtype, device="meta")


def state_key(state: str, key: str) -> str:
    """Name the state of a parameter as checkpoints do."""
    return f"optimizer.state.{state}.{key}"


def add(shards: Shards, entry: ShardedTensor) -> None:
    """Enter a shard under its key."""
    shards.setdefault(entry.key, []).append(entry)


class Clock:
    """CPU seconds of one part after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.process_time()

    def part(self, name: str, share: float = 1.0) -> None:
        """End a part; share: of it that one rank does."""
        self.seconds[name] = (time.process_time() - self._begin) * share
        self._begin = time.process_time()


def measure() -> dict[str, Any]:
    """Plan a save."""
    held = [shards_of(rank) for rank in range(WORLD_SIZE)]
    clock, one = Clock(), 1 / WORLD_SIZE
    names = [[shard_name(entry) for es in shards.values() for entry in es] for shards in held]  # type: ignore[arg-type]
    clock.part("names of a rank's shards", one)
    found = holders(names)
    clock.part("who holds what, on each rank")
    shares = [own_share(shards, found, rank) for rank, shards in enumerate(held)]
    clock.part("a rank's share, each save", one)
    planner = _SavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    local: list[bytes] = []
    for share in shares:
        planner.set_up_planner(mcore_torch.mcore_to_pyt_state_dict(dict(share), False), None, True)  # type: ignore[arg-type]
        local.append(pickle.dumps(planner.create_local_plan()))
    clock.part("a rank's plan, each save", one)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with without_collection():
        plans = [pickle.loads(plan) for plan in local]
        made, metadata = planner.create_global_plan(plans)
        back = sum(len(pickle.dumps(plan)) for plan in made)
    clock.part("plan of all, rank 0, first save")
    places = enumerate(made)
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", 10**8 * number, 10**8)
        for rank, plan in places
        for number, item in enumerate(plan.items)
    }
    listed = len(pickle.dumps(metadata))
    clock.part("list of all pieces, rank 0, each save")
    sizes = [sum(tensor.nbytes for _, tensor in tensors_of(share)) for share in shares]
    pieces = [sum(map(len, share.values())) for share in shares]
    return {
        "seconds": clock.seconds,
        "rank_bytes": {"min": min(sizes), "mean": sum(sizes) / WORLD_SIZE, "max": max(sizes)},
        "rank_pieces": {"min": min(pieces), "max": max(pieces)},
        "pieces": sum(pieces),
        "plan_bytes": {"to_rank_0": sum(map(len, local)), "from_rank_0": back},
        "memory_of_planning_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "metadata_bytes": listed,
    }


def markdown(result: dict[str, Any]) -> str:
    """Write the figures as tables."""
    where, found = result["machine"], result["figures"]
    sizes, pieces = found["rank_bytes"], found["rank_pieces"]
    lines = [
        "# Planning a save of m3 on 256 ranks",
        "",
        f"`{result['command']}`, commit {where['commit']}, one core of {where['cpu']}, Python "
        f"{where['python']}; shards without content, pp 4, cp 64, ep 64. {result['note']}".rstrip(),
        "",
        "| | |",
        "|---|---|",
        f"| bytes of a rank | {sizes['min'] / 1e9:.1f} to {sizes['max'] / 1e9:.1f} GB, "
        f"mean {sizes['mean'] / 1e9:.1f} |",
        f"| pieces of a rank | {pieces['min']} to {pieces['max']}, {found['pieces']} together |",
        f"| plans sent to rank 0 | {found['plan_bytes']['to_rank_0'] / 1e6:.1f} MB |",
        f"| memory of planning, rank 0 | {found['memory_of_planning_bytes'] / 1e6:.0f} MB |",
        f"| `.metadata` | {found['metadata_bytes'] / 1e6:.1f} MB |",
        "",
        "| part | CPU |",
        "|---|---|",
        *(f"| {name} | {seconds:.3f} s |" for name, seconds in found["seconds"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Megatron asks for the rank; nothing is exchanged
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    result = {
        "command": command("benchmarks.checkpoint.plan", sys.argv[1:]),
        "note": arguments.note,
        "machine": machine(),
        "load": os.getloadavg()[0],
        "figures": measure(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "checkpoint_plan.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "checkpoint_plan.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
