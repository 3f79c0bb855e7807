"""Estimate the least memory that workers on this machine's CPU would take, before one of them is started.

Without it a model that is far too large fills the memory and the swap, for minutes, until the system kills
some process. What is counted is a lower bound, so that no run is refused that would fit.
"""

import os

from msa_train.config import EngineKind, Precision, Recompute, RunConfig, longest_seq_len
from msa_train.config.deepspeed.state_bytes import zero_bytes
from msa_train.config.model_size import model_size
from msa_train.config.recompute import stage_recomputes

# weights, gradients and the optimizer's two moments and copies, in fp32 or bf16 alike
BYTES_PER_PARAMETER = 16
# tokens and labels of a pack while its step lasts
BYTES_PER_TOKEN = 16


def check_memory(config: RunConfig, world_size: int, machine_bytes: int | None = None) -> None:
    """Check that the machine could hold what its workers need at the very least.

    The error names the setting that takes most.

    Args:
        config: the whole run, whose rules hold.
        world_size: workers, all on this machine's CPU.
        machine_bytes: memory of the machine; None: that of this one.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    have = machine_memory() if machine_bytes is None else machine_bytes
    needs = least_bytes(config, world_size)
    if not have or sum(needs.values()) <= have:
        return
    setting, need = max(needs.items(), key=lambda item: item[1])
    raise ValueError(
        f"{setting}: {world_size} workers need at least {need / 1e9:,.0f} GB for it, and "
        f"have {have / 1e9:,.0f} GB of memory; use a smaller one, or more machines"
    )


def least_bytes(config: RunConfig, world_size: int) -> dict[str, int]:
    """Count the bytes of all workers together, by the setting that they follow from.

    Args:
        config: the whole run, whose rules hold.
        world_size: workers.

    Example: run=demo on 2 workers, cp 2 and ep 2, 8192 tokens -> 20.6 MB by the model (of 0.8M parameters the
    experts are halved: 0.64M per worker, 16 bytes each), 0.26 MB by the batch (1 pack, held by both, of 8192
    * 16 bytes), 12.6 MB by the sequence (4096 tokens per worker, the input of every layer).
    """
    parallel, train = config.parallel, config.train
    size, seq_len = model_size(config.model, config.attention), longest_seq_len(config)
    dense, experts = size.total - size.experts, size.experts // parallel.ep_size
    weights = (dense // parallel.tp_size + experts) // parallel.pp_size
    of_model = world_size * weights * BYTES_PER_PARAMETER
    if config.engine is EngineKind.deepspeed:
        zero = zero_bytes(config.deepspeed, train.precision)
        own = dense / world_size + experts * parallel.ep_size / world_size
        of_model = int(world_size * (sum(zero.device(weights, own).values()) + zero.host(own)))
    # of a rank and step: the batch over the data-parallel size
    packs = train.global_batch_size * parallel.cp_size * parallel.tp_size * parallel.pp_size // world_size
    # what enters a layer is kept for its backward pass, or at least that of the first one
    is_full = set(stage_recomputes(config)) == {Recompute.full}
    layers = 1 if is_full else config.model.num_layers // parallel.pp_size
    width = config.model.hidden_size * (2 if train.precision is Precision.bf16 else 4)
    kept = seq_len // (parallel.cp_size * parallel.tp_size) * width * layers
    return {
        f"model={config.model.name}": of_model,
        f"train.global_batch_size={train.global_batch_size}": world_size * packs * seq_len * BYTES_PER_TOKEN,
        f"data.seq_len={seq_len}": world_size * kept,
    }


def machine_memory() -> int:
    """Read the bytes of physical memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
