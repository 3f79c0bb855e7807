"""Records which blocks a trained model selects, for the benchmark's `trained` selection.

    msa-train run=demo
    python -m benchmarks.exchange.record --trained runs/demo

One held-out pack of the run's data goes through the model in one process. Of its MSA layers the first
--num-groups (layer, KV group) selections are kept, of the pack's first --seq-len tokens: attention is causal, so
these are a pack of their own.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

# Megatron compiles small functions on their first call, which helps nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.exchange.selections import RECORDED
from launchers.compose import load_run
from msa_train.config import Engine, ParallelConfig, RunConfig
from msa_train.data import load_datasets
from msa_train.model.attention import MsaSelfAttention
from msa_train.model.pack_params import LayerStats
from msa_train.parallel.groups import build_groups, destroy_groups
from msa_train.training.checkpoint import Checkpointer
from msa_train.training.torch_engine import TorchEngine
from msa_train.training.weights_checkpoint import checkpoint_folder


def main() -> None:
    """Read the command line, load, record, write."""
    pass


if __name__ == "__main__":
    main()
