"""Measure the resident memory of a rank with engine=torch and every stage of ZeRO, with and without offload.

    python -m benchmarks.engines.memory --out benchmarks/results

A dense model in bf16 on two ranks of this machine's CPU, each setting in processes of its own: resident bytes
after some steps beyond those before the engine was built, and the most during a step. On a CPU device and
host memory are one, so the sum of both is measured: ZeRO-Offload moves nothing, and shows what it adds. The
steps have 64 tokens, so that activations are small. Models of two sizes are measured, and what a parameter
takes is the difference of the two: what a process has besides the model is in both.

Offload to NVMe goes to a temporary folder, or to --disk, and needs DeepSpeed's async_io. Writes
engines_memory.json and .md.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import command, machine, status_bytes
from msa_train.config import (
    AttentionConfig,
    DataConfig,
    DeepSpeedConfig,
    EngineKind,
    ModelConfig,
    Offload,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from msa_train.config.deepspeed.async_io import async_io_file
from msa_train.config.deepspeed.state_bytes import UPDATE_BYTES, zero_bytes
from msa_train.config.lr_schedule import LearningRates
from msa_train.config.optimizer_bytes import optimizer_bytes
from msa_train.parallel.process_groups import build_groups
from msa_train.training.step_batch import make_batch
from msa_train.training.worker import build_engine
from tests.helpers.packs import make_pack

RANKS, SEQ_LEN, STEPS, MIB = 2, 64, 3, 2**20
BUCKET = 1_000_000
ON_HOST = {"offload_optimizer": Offload.cpu}
# as small beside the model as the default is beside a large one
SUB_GROUPS = {"raw": {"zero_optimization": {"sub_group_size": 1_000_000}}}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "torch": None,
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-1, offload_optimizer=cpu": {"zero_stage": 1, **ON_HOST},
    "ZeRO-2, offload_optimizer=cpu": {"zero_stage": 2, **ON_HOST},
    "ZeRO-3, offload_optimizer=cpu": {"zero_stage": 3, **ON_HOST},
    "ZeRO-3, offload_optimizer=cpu, offload_param=cpu": {
        "zero_stage": 3,
        **ON_HOST,
        "offload_param": Offload.cpu,
    },
    "ZeRO-3, offload_optimizer=nvme": {"zero_stage": 3, "offload_optimizer": Offload.nvme, **SUB_GROUPS},
    "ZeRO-3, offload_optimizer=nvme, offload_param=nvme": {
        "zero_stage": 3,
        "offload_optimizer": Offload.nvme,
        "offload_param": Offload.nvme,
        **SUB_GROUPS,
    },
}


def config_of(settings: dict[str, Any] | None, hidden_size: int, run_dir: str) -> RunConfig:
    """Describe a dense model of eight layers without index branches."""
    sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "prefetch_bucket_size": BUCKET}
    return RunConfig(
        run_dir=run_dir,
        engine=EngineKind.torch if settings is None else EngineKind.deepspeed,
        deepspeed=DeepSpeedConfig(**sizes, **(settings or {})),
        model=ModelConfig(
            num_layers=8,
            hidden_size=hidden_size,
            num_heads=8,
            num_kv_heads=8,
            head_dim=hidden_size // 8,
            vocab_size=2048,
            num_dense_ffn_layers=8,
            ffn_hidden_size=3 * hidden_size,
            layer_attention="full",
            rotary_dim=hidden_size // 16,
        ),
        attention=AttentionConfig(block_size=SEQ_LEN),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(lr=1e-3),
        parallel=ParallelConfig(),
        train=TrainConfig(precision=Precision.bf16, global_batch_size=RANKS),
    )


def _resident() -> int:
    """Return the resident bytes of this process, without what was freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """Return the most resident bytes since `_forget_peak`."""
    return status_bytes("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(rank: int, settings: dict[str, Any] | None, hidden_size: int, folder: str) -> None:
    """Build an engine, make steps, and write what this rank held; runs in a process of its own."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    if settings is not None:
        # what its import takes is no state of the model
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    config = config_of(settings, hidden_size, folder)
    config.deepspeed.nvme_path = folder
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    before = _resident()
    engine = build_engine(config, groups)
    rates = LearningRates(backbone=1e-3, index=1e-3)
    for step in range(STEPS):
        packs = [
            make_pack([SEQ_LEN], seq_len=SEQ_LEN, block_size=64, vocab_size=2048, seed=step * RANKS + rank)
        ]
        batch = make_batch(packs, groups, recall_seed=step)
        if step == STEPS - 1:
            _forget_peak()
        engine.train_step(batch, rates)
    counts = torch.tensor([_peak() - before, _resident() - before, _files(Path(folder))], dtype=torch.int64)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    if rank == 0:
        shapes = [getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()]
        names = ("peak", "after", "files")
        found = {name: int(count) for name, count in zip(names, counts, strict=True)}
        Path(folder, "found.json").write_text(json.dumps(found | {"parameters": sum(shapes)}))
    dist.barrier()
    engine.close()
    # DeepSpeed's threads may outlive the interpreter's end
    os._exit(0)


def _files(folder: Path) -> int:
    """Return the bytes of a rank's swap files."""
    return sum(path.stat().st_size for path in folder.rglob("*.swp")) // RANKS


def expected(settings: dict[str, Any] | None, parameters: int) -> dict[str, float]:
    """Count the bytes of a rank by arithmetic, device and host together: after a step, and the most in it."""
    config = config_of(settings, 64, "")
    if settings is None:
        each = optimizer_bytes(config.optim, Precision.bf16)
        after = parameters * (each.unsharded + each.state)
        return {"after": after, "peak": after + each.step_temporary, "files": 0.0}
    zero = zero_bytes(config.deepspeed, Precision.bf16)
    own = parameters / RANKS
    states = zero.device(parameters, own)
    kept = states if zero.keeps_gradients else states | {"gradients": 0.0}
    update = UPDATE_BYTES if zero.own_host else 0
    most = sum(states.values()) + zero.host(own) + zero.step(parameters, own) + update
    return {
        "after": sum(kept.values()) + zero.host(own) + zero.temporary,
        "peak": most,
        "files": zero.own_file * own,
    }


def run(hidden_sizes: list[int], disk: str | None) -> list[dict[str, Any]]:
    """Measure every setting with models of both sizes."""
    rows: list[dict[str, Any]] = []
    for name, settings in SETTINGS.items():
        if _needs_disk(settings) and not async_io_file().is_file():
            print(f"{name}: left out, DeepSpeed's async_io is not compiled")
            continue
        each: list[dict[str, Any]] = []
        for hidden_size in hidden_sizes:
            with tempfile.TemporaryDirectory(dir=disk) as folder:
                mp.spawn(measure, (settings, hidden_size, folder), nprocs=RANKS)
                found = json.loads(Path(folder, "found.json").read_text())
            each.append(found | {"expected": expected(settings, found["parameters"])})
            print(name, hidden_size, {key: round(value / MIB) for key, value in found.items()})
        rows.append({"setting": name, "sizes": each})
    return rows


def _needs_disk(settings: dict[str, Any] | None) -> bool:
    return Offload.nvme in (settings or {}).values()


def slope(sizes: list[dict[str, Any]], key: str) -> float:
    """Return the bytes that one parameter takes: those of the larger model less those of the smaller."""
    small, large = sizes[0], sizes[-1]
    more = large["parameters"] - small["parameters"]
    return (large[key] - small[key]) / more


def table(rows: list[dict[str, Any]], ran_on: dict[str, Any], how: str) -> str:
    """Write the page."""
    sizes = [f"{one['parameters'] / 1e6:.0f}M" for one in rows[0]["sizes"]]
    lines = [
        "# Resident memory of a rank by engine and stage of ZeRO",
        "",
        f"`{how}`, commit {ran_on['commit']}: dense models of {' and '.join(sizes)} parameters in bf16 on "
        f"{RANKS} ranks of a CPU, the fuller rank beyond what it held before the engine was built. On a CPU "
        "device and host memory are one, so each figure is the sum of both; nothing here ran on a GPU.",
        "",
        "Bytes per parameter are those of the larger model less those of the smaller, by the parameters that "
        "it has more; beside them the same by `msa_train.config`, which leaves out activations and what a "
        "process has besides. MiB are of the larger model.",
        "",
        "| setting | bytes per parameter after a step | by formula | at most in a step | by formula | "
        "MiB after | by formula | MiB at most | by formula | MiB in files |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = row["sizes"]
        computed = [one["expected"] | {"parameters": one["parameters"]} for one in measured]
        cells = [f"{slope(kind, key):.2f}" for key in ("after", "peak") for kind in (measured, computed)]
        large = measured[-1]
        cells += [f"{one[key] / MIB:.0f}" for key in ("after", "peak") for one in (large, large["expected"])]
        cells.append(f"{large['files'] / MIB:.0f}" if large["files"] else "")
        lines.append(f"| {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for engines_memory.json and .md")
    parser.add_argument("--hidden-sizes", type=int, nargs=2, default=[512, 1024], help="of both models")
    parser.add_argument("--disk", help="folder for files of offload to NVMe")
    arguments = parser.parse_args()
    ran_on, how = machine(), command("benchmarks.engines.memory", sys.argv[1:])
    rows = run(sorted(arguments.hidden_sizes), arguments.disk)
    page = table(rows, ran_on, how)
    print(page)
    if arguments.out:
        result = {"command": how, "machine": ran_on, "rows": rows}
        (arguments.out / "engines_memory.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "engines_memory.md").write_text(page)


if __name__ == "__main__":
    main()
