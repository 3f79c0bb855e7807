"""Run flash-msa 0.1.1, public training kernels for the same attention, timed beside ours in the same run.

What it is, as read from its wheel (nothing of it is copied here):

- `flash_msa_func(q_index, k_index, q, k, v, topk_tokens, scale)` gives the output [B, S, heads * D] and a
  zero that stands for the KL loss: with it in the loss, the backward computes the index branch's gradients.
- All tensors are [B, heads, S, D], fp16 or bf16, D 128, blocks of 128 tokens, up to 32 of them per query;
  one document of full length, no packs, no positions.
- The query's own block is always among those selected, as ours is.
- Index heads are a multiple of the KV heads and divide the query heads. Each selects for its own query
  heads, neighbours, and is taught by their mean. Index keys may have fewer heads; here one, as the paper
  has.
- Forward: a selection kernel in CuTeDSL, the inverse lists for the backward (in every forward; the host
  waits), then FlashAttention 4 or 3 over the own blocks and, 256 lists at a time, over the others, merged
  in fp32. Backward: one CuTeDSL kernel that adds all gradients with fp32 atomics, so results differ from
  run to run.
- It compiles a CUDA file with nvcc when first called, needs Python's headers for that, and asks for torch
  2.12.

Ours in the nearest shape is FLASH_MSA_SIZES: 16 query heads in 4 groups, not in 2. Theirs has 4 index heads
for 2 KV heads, so a KV head serves two selections of 4 query heads each; ours has one index head per KV
group. With 4 groups both score 4 index heads against all keys, select 4 times per query, attend with 4 query
heads to each selection, and teach 4 index heads by 4 heads each: operation by operation the same. With 2
groups ours would score and select half as much and read a block for 8 heads at once, an easier problem. What
still differs favours theirs: ours reads keys and values of 4 heads, theirs of 2, and ours computes the KL
loss's value too.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_path

import torch

from benchmarks.gpu.problem import LayerSizes, Tensors

SEQ_LENS = (2**14, 2**15)
NUM_HEADS, NUM_KV_HEADS, NUM_INDEX_HEADS, NUM_INDEX_KEY_HEADS = 16, 2, 4, 1
HEAD_DIM = 128
TOPK_TOKENS = 2048
# ours, timed beside it: see above
FLASH_MSA_SIZES = LayerSizes(num_heads=NUM_HEADS, num_kv_heads=NUM_INDEX_HEADS)
# importable name and the package that has it
_NEEDS = {"flash_msa": "flash-msa", "cutlass": "nvidia-cutlass-dsl", "cuda.bindings": "cuda-python"}
_ATTENTION = ("flash_attn.cute", "flash_attn_interface")
_PROGRAMS = ("nvcc", "ninja", "c++")
# It is written for Hopper and Blackwell.
_OLDEST_CAPABILITY = 9


def why_not() -> str | None:
    """Say why flash-msa cannot run here; None where nothing is known that would keep it from running.

    Imports it last: a package that is there and broken is a reason too.
    """
    _look_elsewhere()
    missing = [package for name, package in _NEEDS.items() if not _is_there(name)]
    if not any(_is_there(name) for name in _ATTENTION):
        missing.append("flash-attn-4")
    if missing:
        return f"{', '.join(missing)}: not installed; benchmarks/gpu/wheels.sh --with-flash-msa fetches them"
    if not torch.cuda.is_available():
        return "it needs a GPU"
    if torch.cuda.get_device_capability()[0] < _OLDEST_CAPABILITY:
        return f"it needs Hopper or Blackwell, this is {torch.cuda.get_device_name()}"
    if lacking := _lacking():
        return f"it compiles a CUDA file when first called; missing for that: {', '.join(lacking)}"
    try:
        import flash_msa  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:
        # whatever another project's modules raise when they are loaded
        return f"its import fails: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _look_elsewhere() -> None:
    """Take this folder off the path, where Python puts it for a script in it: its flash_msa is this file."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        # of the package that it is in; of a module that was put there by hand
        return False


def _lacking() -> list[str]:
    """List what its build needs and does not find: on the path, beside this Python, in CUDA's folder."""
    folders = (Path(sys.executable).parent, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    names = [
        name for name in _PROGRAMS if not (which(name) or any((folder / name).exists() for folder in folders))
    ]
    return names if Path(get_path("include"), "Python.h").exists() else [*names, "Python.h"]


def flash_msa_steps(tensors: Tensors, seq_len: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return its forward without autograd, and its forward and backward with the index branch's gradients.

    Args:
        tensors: on a GPU, in bf16.
        seq_len: tokens of the one document, a multiple of 128 and at least TOPK_TOKENS.
    """
    _look_elsewhere()
    from flash_msa import flash_msa_func  # pyright: ignore[reportMissingImports]

    def heads(number: int) -> torch.Tensor:
        return tensors.normal(1, number, seq_len, HEAD_DIM)

    # in the order of its arguments: index queries and keys, queries, keys, values
    numbers = (NUM_INDEX_HEADS, NUM_INDEX_KEY_HEADS, NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    inputs = [heads(number) for number in numbers]
    dout = tensors.normal(1, seq_len, NUM_HEADS * HEAD_DIM)
    scale = HEAD_DIM**-0.5

    def forward() -> object:
        with torch.no_grad():
            return flash_msa_func(*inputs, TOPK_TOKENS, scale)

    def training_step() -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out, kl = flash_msa_func(*leaves, TOPK_TOKENS, scale)
        return torch.autograd.grad([out, kl], leaves, [dout, torch.ones_like(kl)])

    return forward, training_step
