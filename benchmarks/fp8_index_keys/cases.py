"""Make index queries and keys to compare selections on: random ones, and those of a small trained model.

Shapes: Q queries, M KV groups, D index head dim, S keys of one document, NB blocks, K top-k slots.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

# Megatron compiles small functions on their first call, which helps nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.distributed as dist
from msa_kernels import select_blocks
from torch import Tensor

from benchmarks.learning.measure import block_mass
from benchmarks.learning.recipe import BLOCK_SIZE, SEQ_LEN, TOPK, Variant, run_config
from benchmarks.learning.run_one import build_tasks
from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.config.lr_schedule import stage_rates
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.parallel.process_groups import build_groups, destroy_groups
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch

# M3's: four KV groups, index head dim 128, 16 blocks of 128
_GROUPS, _DIM, _BLOCK, _TOPK = 4, 128, 128, 16
_RANDOM_LEN, _RANDOM_QUERIES = 65536, 64
_SEED = 1
_TRAINED_QUERIES = 128


@dataclass(slots=True)
class Pack:
    """Hold the index branch's tensors of one document."""

    q: Tensor
    "[Q, M, D] index queries"
    k: Tensor
    "[S, D] index keys"
    position: Tensor
    "[Q], of the queries in the document"
    attention: Tensor | None = None
    "[Q, M, NB], what the main branch gives each block; None where there is none"


@dataclass(slots=True)
class Case:
    """Hold documents of one kind."""

    name: str
    "short, for the JSON"
    what: str
    "a phrase for the report"
    packs: list[Pack]
    "one per document"
    block_size: int
    "tokens of a block"
    topk: int
    "blocks that a query selects"

    def select(self, pack: Pack, keys: Tensor, *, fp8: bool = False) -> Tensor:
        """Find the blocks [Q, M, K] that the pack's queries select of these keys [S, D]; fp8: of both."""
        documents = torch.tensor([0, keys.shape[0]])
        return select_blocks(
            pack.q,
            keys,
            documents,
            block_size=self.block_size,
            topk=self.topk,
            position=pack.position,
            fp8=fp8,
        )

    def compare(self, pack: Pack, exact: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Compare two selections; [Q, M] each, of queries that see more blocks than they take.

        blocks: share of the blocks that both selected; the query's own, which is forced, does not count.
        student: probability that the index branch gives to the tokens of `other`, over that of `exact`.
        attention: the same of the main branch, where there is one.
        """
        own = (pack.position // self.block_size)[:, None, None]
        both = (exact[..., None] == other[..., None, :]).any(-1) & (exact != own)
        result = {"blocks": both.sum(-1) / (exact != own).sum(-1)}
        student = block_mass(pack.q[:, :, None], _of_all_groups(pack), pack.position, self.block_size)
        for name, mass in (("student", student), ("attention", pack.attention)):
            if mass is not None:
                result[name] = mass.gather(-1, other.long()).sum(-1) / mass.gather(-1, exact.long()).sum(-1)
        return result


def _of_all_groups(pack: Pack) -> Tensor:
    """Repeat index keys as if every group had its own: [S, M, D]."""
    return pack.k[:, None].expand(-1, pack.q.shape[1], -1)


def random_cases() -> Iterator[Case]:
    """Draw normal numbers; and channels of unequal size, with norms as the branch's own norm makes them."""
    generator = torch.Generator().manual_seed(_SEED)
    position = torch.linspace(_RANDOM_LEN // 2, _RANDOM_LEN - 1, _RANDOM_QUERIES).long()
    unequal = "normal random numbers times log-normal sizes of channels (sigma 1), tokens of equal norm"
    for name, what, spread in (("normal", "normal random numbers", 0.0), ("unequal", unequal, 1.0)):
        size = (spread * torch.randn(_DIM, generator=generator)).exp()
        k = torch.randn(_RANDOM_LEN, _DIM, generator=generator) * size
        q = torch.randn(_RANDOM_QUERIES, _GROUPS, _DIM, generator=generator)
        if spread:
            k, q = (x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)) for x in (k, q))
        yield Case(name, what, [Pack(q, k, position)], _BLOCK, _TOPK)


def trained_cases(steps: int, packs: int) -> Iterator[Case]:
    """Train the learning benchmark's `msa` for `steps` steps; give a case per layer, on held-out text."""
    config = run_config(Variant.msa, seed=_SEED, steps=steps)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=0, world_size=1)
        found = _train_and_read(config, packs)
        destroy_groups()
    for layer, for_layer in found.items():
        what = f"layer {layer} of the learning benchmark's model after {steps} steps, held-out text"
        yield Case(f"trained_{layer}", what, for_layer, BLOCK_SIZE, TOPK)


def _train_and_read(config: RunConfig, packs: int) -> dict[int, list[Pack]]:
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    engine = TorchEngine(config, groups)
    task, held_out = build_tasks(config, _SEED)
    stages = plan_stages(config)
    for step in range(config.train.steps):
        stage = stage_at(stages, step)
        if stage != engine.stage:
            engine.set_stage(stage)
        rates = stage_rates(step, config.optim, stage, config.train.steps)
        loss = engine.train_step(make_batch([task[step].pack], groups), rates).lm_loss_sum
        if step % 20 == 0:
            print(f"step {step}: loss {loss / SEQ_LEN:.3f} per token", flush=True)
    reader = _Reader(engine)
    for number in range(packs):
        reader.read(held_out[number].pack)
    return reader.found


class _Reader:
    """Keep what the index branch and the main branch of every MSA layer make of a pack."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.found = engine, dict[int, list[Pack]]()
        budget = BLOCK_SIZE * TOPK
        self.position = torch.linspace(budget, SEQ_LEN - 1, _TRAINED_QUERIES).long()
        for layer in engine.model.decoder.layers:
            if isinstance(layer.self_attention, MsaSelfAttention):
                layer.self_attention.register_forward_hook(self._keep, with_kwargs=True)

    @torch.no_grad()
    def read(self, pack: Any) -> None:
        """Run one pack of one document through the model."""
        self.engine.model.eval()
        engine = self.engine
        params = engine.forward.prepare(pack, num_tokens=1, comm=engine.groups.cp_comm(), stats=LayerStats())
        engine.forward(engine.model, params)

    def _keep(self, module: MsaSelfAttention, inputs: Any, kwargs: Any, _output: Any) -> None:
        context, hidden = (
            kwargs["packed_seq_params"].context,
            inputs[0] if inputs else kwargs["hidden_states"],
        )
        q, k, _ = module._project(hidden, context)
        q_index, k_index = module.index_branch(hidden, context.rotary)
        attention = block_mass(q[self.position], k, self.position, BLOCK_SIZE)
        pack = Pack(q_index[self.position], k_index, self.position, attention)
        self.found.setdefault(module.layer_number, []).append(pack)
