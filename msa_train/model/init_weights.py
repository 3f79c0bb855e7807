"""Draw initial weights by the parameter's global name: the same numbers in every parallel layout.

Each tensor is drawn whole from a generator seeded by (run seed, global name), then cut to this rank's
part. A global name counts layers over pipeline stages and experts over expert-parallel ranks.
"""

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from msa_train.model.layers.norm import RMSNorm
from msa_train.model.transformer_config import MsaTransformerConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")

_MOST_THREADS = 8
_Named = tuple[str, nn.Parameter]


class Partition(Protocol):
    """Know weights of which a rank has a part only."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the whole parameter."""
        ...

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Take this rank's part of the whole parameter's value."""
        ...


def global_names(model: GPTModel, *, ep_rank: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters with names that do not depend on the layout.

    Example: on the second of two expert ranks with 4 experts each, `experts.local_experts.1.` becomes
    `experts.5.`; on the second of two pipeline stages with 3 layers each, `layers.0.` becomes `layers.3.`.
    """
    stage: list[Any] = list(model.decoder.layers)
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        if match:
            layer = stage[int(match[1])]
            name = f"decoder.layers.{layer.layer_number - 1}." + name[match.end() :]
            expert = _EXPERT.search(name)
            if expert:
                index = ep_rank * layer.mlp.num_local_experts + int(expert[1])
                name = f"{name[: expert.start()]}.experts.{index}.{name[expert.end() :]}"
        yield name, parameter


@torch.no_grad()
def init_weights(
    model: GPTModel,
    *,
    seed: int,
    tp_rank: int,
    tp_size: int,
    ep_rank: int,
    partition: Partition | None = None,
) -> None:
    """Fill every parameter: normal with `init_std`, output projections with init_std / sqrt(2 * layers).

    The token embedding (and an output layer tied to it) has `embedding_init_std`, and every row of it one
    common vector of `embedding_shared_std`.

    Norm weights get 1, or 0 where they act as 1 + w.

    Cost: a thread draws 100 million numbers a second (measured); a rank has as many threads as its machine
    has processors for it, at most 8. Of a model of 70B whose weights are cut (ZeRO-3) every rank draws all:
    12 minutes with one thread, by arithmetic 90 s with 8. Host memory: for each thread a parameter in fp32
    and as it is kept.

    Args:
        model: built by `build_model`.
        seed: of the run.
        tp_rank: this rank's part of cut weights.
        tp_size: parts of cut weights.
        ep_rank: this rank's share of the experts.
        partition: of weights that ranks share; None: this rank has all of each.
    """
    config = model.config
    assert isinstance(config, MsaTransformerConfig), "built by model.gpt.build_model"
    # Transformer Engine's is called so too.
    norms = {id(m.weight) for m in model.modules() if type(m).__name__ == RMSNorm.__name__}

    def value_of(named: tuple[str, nn.Parameter]) -> Tensor:
        name, parameter = named
        shape = parameter.shape if partition is None else partition.shape(parameter)
        if id(parameter) in norms:
            value = torch.full(shape, 0.0 if config.layernorm_zero_centered_gamma else 1.0)
        else:
            value = _draw(name, parameter, shape, _std(name, config), seed, tp_rank, tp_size)
        # sums are of the precision that they are kept in
        value = value.to(parameter.dtype)
        if name == _EMBEDDING:
            # A component that all tokens share gives queries and keys one too: attention by distance alone.
            shared = torch.empty(shape[1])
            shared.normal_(
                0.0, config.model.embedding_shared_std, generator=_generator(seed, f"{name}:shared")
            )
            value.add_(shared.to(value))
        return value

    for (_, parameter), value in _computed(value_of, global_names(model, ep_rank=ep_rank), _num_threads()):
        if partition is None:
            parameter.copy_(value)
        else:
            partition.fill(parameter, value)


def _num_threads() -> int:
    """Share the processors among the ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


def _computed(
    compute: Callable[[_Named], Tensor], items: Iterable[_Named], num_threads: int
) -> Iterator[tuple[_Named, Tensor]]:
    """Yield items with what is computed of them, in order, at most num_threads of them at a time."""
    waiting: deque[tuple[_Named, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="draw") as pool:
        for item in items:
            if len(waiting) == num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((item, pool.submit(compute, item)))
        for first, future in waiting:
            yield first, future.result()


def _std(name: str, config: MsaTransformerConfig) -> float:
    std = config.model.embedding_init_std if name == _EMBEDDING else config.model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        # Two such outputs per layer add up in the residual stream, whose variance so stays that of one.
        std /= math.sqrt(2 * config.num_layers)
    return std


def _generator(seed: int, name: str) -> torch.Generator:
    # Not Python's hash: that differs between processes.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def _draw(
    name: str, parameter: Tensor, whole: torch.Size, std: float, seed: int, tp_rank: int, tp_size: int
) -> Tensor:
    generator, shape = _generator(seed, name), list(whole)
    # Experts are cut over expert-parallel ranks only.
    cut = tp_size > 1 and getattr(parameter, "tensor_model_parallel", False) and ".experts." not in name
    if cut:
        shape[parameter.partition_dim] *= tp_size  # type: ignore[attr-defined]
    # Drawn whole on every rank, on the CPU and in fp32: the same numbers whatever the layout and device.
    full = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    if not cut:
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):
        # Each rank has its part of the gate above its part of the other half.
        halves = [half.chunk(tp_size, dim)[tp_rank] for half in full.chunk(2, dim)]
        return torch.cat(halves, dim)
    return full.chunk(tp_size, dim)[tp_rank]
