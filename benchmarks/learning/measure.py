"""Measure what a model knows: text loss, accuracy by distance, and how well it selects blocks.

Shapes: T tokens of a pack, M KV groups, G query heads per group, D head dim, NB blocks, K top-k slots,
Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.retrieval_task import LookupPack, Symbols
from msa_train.data import IGNORE_LABEL
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.training.engines.torch_engine import TorchEngine

DISTANCE_EDGES = (0, 128, 256, 512, 1024, 2048)
CP_SIZES = (2, 4, 8, 16)
_TEXT_QUERIES = 128
"text positions per pack at which recall is measured, evenly spaced"


@dataclass(slots=True)
class _Seen:
    """Keep what hooks see of one forward pass."""

    hidden: Tensor | None = None
    "[T, H], the last layer's hidden states"
    layers: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)
    "q, k and selection of each MSA layer, by its number from 1"


class Meter:
    """Measure the model of an engine in one process on packs of the task.

    Args:
        engine: its model and forward pass.
        symbols: ids of keys and values.
    """

    def __init__(self, engine: TorchEngine, symbols: Symbols) -> None:
        self.engine, self.symbols, self._seen = engine, symbols, _Seen()
        engine.model.decoder.register_forward_hook(self._keep_hidden)
        for layer in engine.model.decoder.layers:
            if isinstance(layer.self_attention, MsaSelfAttention):
                layer.self_attention.register_forward_hook(self._keep_layer, with_kwargs=True)

    def _keep_hidden(self, _module: Any, _inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            hidden = output[0] if isinstance(output, tuple) else output
            self._seen.hidden = hidden.flatten(0, 1)

    def _keep_layer(self, module: MsaSelfAttention, inputs: Any, kwargs: Any, _output: Any) -> None:
        if not torch.is_grad_enabled():
            params = kwargs["packed_seq_params"]
            hidden = inputs[0] if inputs else kwargs["hidden_states"]
            q, k, _ = module._project(hidden, params.context)
            self._seen.layers[module.layer_number] = q, k, params.record.block_indices

    @torch.no_grad()
    def measure(self, packs: Sequence[LookupPack]) -> dict[str, Any]:
        """Collect the figures over the packs, as a JSON object.

        text_loss and lookup_loss in nats; accuracy of values over all queries and per distance
        (`DISTANCE_EDGES`), with the number of queries; per MSA layer block recall and score recall, at text
        positions and at queries; f per layer and KV group at each of `CP_SIZES`.
        """
        self.engine.model.eval()
        rows = [self._one(pack) for pack in packs]
        distance = torch.cat([row["distance"] for row in rows])
        correct = torch.cat([row["correct"] for row in rows])
        return {
            "text_loss": float(torch.cat([row["text"] for row in rows]).mean()),
            "lookup_loss": float(torch.cat([row["lookup"] for row in rows]).mean()),
            "accuracy": float(correct.double().mean()),
            "by_distance": _by_distance(distance, correct),
            "layers": {
                layer: {name: _mean([row["layers"][layer][name] for row in rows]) for name in first}
                for layer, first in rows[0]["layers"].items()
            },
        }

    def _one(self, packed: LookupPack) -> dict[str, Any]:
        engine, self._seen = self.engine, _Seen()
        params = engine.forward.prepare(
            packed.pack, num_tokens=1, comm=engine.groups.cp_comm(), stats=LayerStats()
        )
        losses = engine.forward(engine.model, params).flatten()
        labels, query = torch.from_numpy(packed.pack.labels), torch.from_numpy(packed.query)
        assert self._seen.hidden is not None, "the decoder has just run"
        weight = engine.model.output_layer.weight
        assert weight is not None, "the model has its own output weight"
        logits = self._seen.hidden[query] @ weight.T
        is_text = (labels != IGNORE_LABEL) & (labels < self.symbols.first)
        return {
            "text": losses[is_text],
            "lookup": losses[query],
            "correct": logits.argmax(1) == labels[query],
            "distance": torch.from_numpy(packed.distance),
            "layers": {
                layer: self._selection(q, k, block_indices, query, packed)
                for layer, (q, k, block_indices) in self._seen.layers.items()
                if block_indices is not None
            },
        }

    def _selection(
        self, q: Tensor, k: Tensor, block_indices: Tensor, query: Tensor, packed: LookupPack
    ) -> dict[str, Any]:
        """Measure recall at text positions and at queries, best possible score recall, f by cp_size."""
        attention = self.engine.config.attention
        assert len(packed.pack.doc_lengths) == 1, "recall is measured on packs of one document"
        num_tokens, budget = len(packed.pack.tokens), attention.block_size * attention.topk
        # Queries that see no more blocks than they may take would raise the mean for nothing.
        text = torch.arange(budget, num_tokens, max((num_tokens - budget) // _TEXT_QUERIES, 1))
        result: dict[str, Any] = {}
        for name, rows in (("text", text), ("query", query[query >= budget])):
            mass = block_mass(q[rows], k, rows, attention.block_size)
            chosen = _as_mask(block_indices[rows], mass.shape[-1])
            best = _as_mask(mass.topk(attention.topk, -1).indices, mass.shape[-1])
            result[f"block_recall_{name}"] = float((chosen & best).sum(-1).double().mean() / attention.topk)
            result[f"score_recall_{name}"] = float((mass * chosen).sum(-1).mean())
            result[f"best_score_recall_{name}"] = float((mass * best).sum(-1).mean())
        result["f"] = {
            str(cp_size): remote_share(block_indices, mass.shape[-1], attention.block_size, cp_size)
            for cp_size in CP_SIZES
        }
        return result


def block_mass(q: Tensor, k: Tensor, position: Tensor, block_size: int) -> Tensor:
    """Compute the attention that full attention would give to each block, mean over the heads of a group.

    q: [Q, M, G, D] queries at `position` [Q]; k: [T, M, D] keys of one document -> [Q, M, NB], rows sum to 1.
    """
    scores = torch.einsum("qmgd,tmd->qmgt", q, k) * q.shape[-1] ** -0.5
    future = torch.arange(k.shape[0]) > position[:, None, None, None]
    p = scores.masked_fill(future, float("-inf")).softmax(-1).mean(2)
    return p.unflatten(-1, (-1, block_size)).sum(-1)


def remote_share(block_indices: Tensor, num_blocks: int, block_size: int, cp_size: int) -> list[float]:
    """Compute f of each KV group: the share of remote blocks that some query of a rank selected.

    It is the mean over ranks. Ranks are consecutive shards, as with the contiguous layout.
    block_indices: [T, M, K], -1 for none.
    Example: 4 tokens, block_size 1, cp_size 2, blocks {0}, {1}, {0, 2}, {3} -> rank 0 needs none of its two
    remote blocks, rank 1 needs one of two: 0.25.
    """
    chosen = _as_mask(block_indices, num_blocks).unflatten(0, (cp_size, -1)).any(1)
    shard = torch.arange(num_blocks) * cp_size // num_blocks
    remote = shard[None] != torch.arange(cp_size)[:, None]
    return ((chosen & remote[:, None]).sum((0, 2)) / remote.sum()).tolist()


def _as_mask(block_indices: Tensor, num_blocks: int) -> Tensor:
    """Mark blocks: [..., K] ids, -1 for none -> [..., NB] bool."""
    index = block_indices.long()
    mask = torch.zeros(*index.shape[:-1], num_blocks + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(index < 0, num_blocks, index), True)[..., :-1]


def _by_distance(distance: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for low, high in pairwise(DISTANCE_EDGES):
        here = (distance >= low) & (distance < high)
        accuracy = float(correct[here].double().mean()) if here.any() else None
        result.append({"from": low, "below": high, "queries": int(here.sum()), "accuracy": accuracy})
    return result


def _mean(values: list[Any]) -> Any:
    """Average element by element through equal structures of dictionaries and lists."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean([value[i] for value in values]) for i in range(len(first))]
    return sum(values) / len(values)
