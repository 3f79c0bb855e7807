"""Record which blocks a trained model selects, for the benchmark's `trained` selection.

    msa-train run=demo
    python -m benchmarks.exchange.record --trained runs/demo

One held-out pack of the run's data goes through the model in one process. Of its MSA layers the first
--num-groups (layer, KV group) selections are kept, of the pack's first --seq-len tokens: attention is causal,
so these are a pack of their own.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Megatron compiles small functions on their first call, which helps nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.exchange.selections import RECORDED
from launchers.hydra_config.compose import load_run
from msa_train.config import ParallelConfig, RunConfig
from msa_train.data import load_datasets
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.parallel.process_groups import build_groups, destroy_groups
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.resume import resume


@torch.no_grad()
def recorded_selection(config: RunConfig) -> tuple[Tensor, int, list[int]]:
    """Record the selections of the run's newest checkpoint on its first held-out pack.

    Returns:
        [S, M * MSA layers, K] int32 block ids, layer by layer; the step of the checkpoint; real tokens of
        each document.
    """
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    engine = TorchEngine(config, groups)
    step, _ = resume(config, engine)
    _, held_out, _ = load_datasets(
        config.data, block_size=config.attention.block_size, vocab_size=config.model.vocab_size
    )
    assert held_out is not None, "the demo's corpus has more than one document"
    selections: list[Tensor] = []

    def keep(_module: MsaSelfAttention, _inputs: Any, kwargs: dict[str, Any], _output: Any) -> None:
        selections.append(kwargs["packed_seq_params"].record.block_indices)

    for layer in engine.model.decoder.layers:
        if isinstance(layer.self_attention, MsaSelfAttention):
            layer.self_attention.register_forward_hook(keep, with_kwargs=True)
    engine.model.eval()
    pack = held_out[0]
    params = engine.forward.prepare(pack, num_tokens=1, comm=groups.cp_comm(), stats=LayerStats())
    engine.forward(engine.model, params)
    destroy_groups()
    return torch.cat(selections, dim=1), step, pack.doc_lengths.tolist()


def main() -> None:
    """Read the command line, load, record, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="run_dir of a finished run")
    parser.add_argument("--seq-len", type=int, default=4096, help="first tokens of the pack that are kept")
    parser.add_argument(
        "--num-groups", type=int, default=4, help="(layer, KV group) selections that are kept"
    )
    parser.add_argument("--out", type=Path, default=RECORDED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_run(arguments.trained / "config.yaml")
    config.parallel, config.run_dir = ParallelConfig(), str(arguments.trained)
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=0, world_size=1)
        blocks, step, documents = recorded_selection(config)
    blocks = blocks[: arguments.seq_len, : arguments.num_groups]
    np.savez_compressed(
        arguments.out,
        block_indices=blocks.numpy().astype(np.int16),
        block_size=config.attention.block_size,
        step=step,
        doc_lengths=documents,
    )
    print(f"{arguments.out}: {tuple(blocks.shape)}, step {step}, documents of {documents} tokens")


if __name__ == "__main__":
    main()
