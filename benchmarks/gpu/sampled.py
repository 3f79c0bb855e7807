"""Check at full length, after timing: some queries and some blocks of what was timed, against fp64.

Shapes: n queries, one KV group of G query heads, K blocks of B tokens each, L = K * B, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.comparison import Check, against_plain, selection_check
from benchmarks.gpu.layer import LayerInputs, layer_step
from benchmarks.gpu.problem import IndexBranch

NUM_QUERIES = 64
NUM_BLOCKS = 2
# Queries whose keys are gathered at once: in fp64 some hundred MiB at M3's shape
_CHUNK = 64


@dataclass(slots=True)
class _Rows:
    """Hold attention of some queries, and what it leaves at each token they see."""

    out: Tensor
    """[n, G, D]; dq alike; dq_index [n, Di]."""
    dq: Tensor
    dq_index: Tensor
    dk: Tensor
    """[n, K, B, D], this query's share; dv alike; dk_index [n, K, B, Di]."""
    dv: Tensor
    dk_index: Tensor


def sampled_checks(inputs: LayerInputs, index: IndexBranch, kernel: str) -> list[Check]:
    """Run the layer's step once and compare samples of everything it returns.

    Args:
        inputs: of one KV group, with the blocks that were selected for it.
        index: index queries and keys of all groups, from which they were selected.
        kernel: what is checked.
    """
    out, dq, dk, dv, dq_index, dk_index = layer_step(inputs, kernel)
    S, NB = inputs.q.shape[0], inputs.q.shape[0] // inputs.block_size
    case = f"sampled at {S}"
    rows = _spread(S, NUM_QUERIES, inputs.q.device)
    found = [_selection(f"{case}: selection", inputs, index, rows)]
    plain, exact = (_rows(inputs, rows, dtype) for dtype in (inputs.q.dtype, torch.float64))
    ours = {"out": out, "dq": dq, "dq_index": dq_index}
    for name, values in ours.items():
        got, low, high = values[rows, 0], getattr(plain, name), getattr(exact, name)
        found.append(against_plain(f"{case}: {name}", got, low, high))
    blocks = _spread(NB, NUM_BLOCKS, inputs.q.device).tolist()
    ours = {"dk": dk[:, 0], "dv": dv[:, 0], "dk_index": dk_index}
    plain_blocks, exact_blocks = (
        [_of_block(inputs, block, dtype) for block in blocks] for dtype in (inputs.q.dtype, torch.float64)
    )
    for name, values in ours.items():
        got = torch.stack([values.view(NB, inputs.block_size, -1)[block] for block in blocks])
        low, high = (torch.stack([one[name] for one in found]) for found in (plain_blocks, exact_blocks))
        found.append(against_plain(f"{case}: {name}", got, low, high))
    return found


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """Choose [count] int64 from all over a range, its ends among them."""
    return torch.linspace(0, size - 1, min(count, size), dtype=torch.float64, device=device).long()


def _selection(name: str, inputs: LayerInputs, index: IndexBranch, rows: Tensor) -> Check:
    B, topk = inputs.block_size, inputs.block_indices.shape[-1]
    best = []
    keys = index.k.double()
    for row in rows.split(_CHUNK):
        scores = index.q[row, :1].double().flatten(0, 1) @ keys.T
        best.append(scores.view(len(row), 1, -1, B).amax(-1))
    own = inputs.position[rows] // B
    ids = inputs.block_indices[rows]
    return selection_check(name, torch.cat(best), ids, torch.zeros_like(own), own, topk)


def _rows(inputs: LayerInputs, rows: Tensor, dtype: torch.dtype) -> _Rows:
    """Compute these queries by the definitions, all in one dtype."""
    B, ids, q = inputs.block_size, inputs.block_indices[rows, 0].long(), inputs.q[rows, 0].to(dtype)
    token = ids.clamp(min=0)[..., None] * B + torch.arange(B, device=ids.device)
    seen = ((ids >= 0)[..., None] & (token <= inputs.position[rows][:, None, None])).flatten(1)
    flat = token.flatten(1)
    k, v, k_index = (x[flat].to(dtype) for x in (inputs.k[:, 0], inputs.v[:, 0], inputs.k_index))
    q_index, dout = inputs.q_index[rows, 0].to(dtype), inputs.dout[rows, 0].to(dtype)
    scale, index_scale = q.shape[-1] ** -0.5, q_index.shape[-1] ** -0.5
    scores = torch.einsum("ngd,nld->ngl", q, k) * scale
    p = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    out = p @ v
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    logits = torch.einsum("nd,nld->nl", q_index, k_index) * index_scale
    student = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    difference = student - p.mean(1)
    shape = (*ids.shape, B, -1)
    return _Rows(
        out=out,
        dq=scale * ds @ k,
        dq_index=index_scale * torch.einsum("nl,nld->nd", difference, k_index),
        dk=(scale * ds.mT @ q).view(shape),
        dv=(p.mT @ dout).view(shape),
        dk_index=(index_scale * difference[..., None] * q_index[:, None]).view(shape),
    )


def _of_block(inputs: LayerInputs, block: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sum the shares of all queries that selected a block: dk, dv, dk_index [B, channels]."""
    query, slot = (inputs.block_indices[:, 0] == block).nonzero(as_tuple=True)
    total: dict[str, Tensor] = {}
    for rows, slots in zip(query.split(_CHUNK), slot.split(_CHUNK), strict=True):
        part = _rows(inputs, rows, dtype)
        place = torch.arange(len(rows), device=rows.device)
        for name in ("dk", "dv", "dk_index"):
            share = getattr(part, name)[place, slots].sum(0)
            total[name] = share if name not in total else total[name] + share
    return total
