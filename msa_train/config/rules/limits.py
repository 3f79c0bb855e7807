"""Limit sizes to the largest that are taken at their word; what lies above is a slip of the hand.

A size beyond them would fill the memory, or keep the machine busy for minutes, before anything else could
refuse it. Each limit is far above what has been trained anywhere.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import cast

from msa_train.config.model import MAX_LAYERS
from msa_train.config.run import RunConfig
from msa_train.config.stage_plan import plan_stages

COUNT = 2**31 - 1
"of steps and of whatever has no limit of its own"
LONGEST_WAIT_S = 2_000_000
"23 days: gloo counts milliseconds in 32 bits"
MOST_BLOCKS = 2**22
"of a pack: planning keeps some numbers for each"
MOST_TOKENS = 2**62

LIMITS = {
    "model.num_layers": MAX_LAYERS,
    "model.hidden_size": 2**20,
    "model.num_heads": 2**16,
    "model.num_kv_heads": 2**16,
    "model.head_dim": 2**14,
    "model.vocab_size": 2**26,
    "model.ffn_hidden_size": 2**22,
    "model.num_experts": 2**16,
    "model.moe_ffn_hidden_size": 2**22,
    "model.shared_expert_hidden_size": 2**22,
    "attention.block_size": 2**20,
    "attention.topk": 2**20,
    "attention.index_head_dim": 2**14,
    "parallel.cp_size": 2**20,
    "parallel.cp_head_size": 2**16,
    "parallel.ep_size": 2**20,
    "parallel.tp_size": 2**16,
    "parallel.pp_size": 2**16,
    "deepspeed.reduce_bucket_size": 2**40,
    "deepspeed.allgather_bucket_size": 2**40,
    "deepspeed.prefetch_bucket_size": 2**40,
    "deepspeed.param_persistence_threshold": 2**40,
    "exchange.ranks_per_node": 2**16,
    "data.seq_len": 2**30,
    "data.seed": 2**62,
    "train.global_batch_size": 2**24,
    "train.validation_packs": 2**24,
    "train.spike_window": 2**24,
    "train.seed": 2**62,
    "logging.attention_queries": 2**20,
    "launcher.num_processes": 4096,
    "launcher.threads_per_process": 4096,
    "launcher.timeout_s": LONGEST_WAIT_S,
    "watchdog.timeout_s": LONGEST_WAIT_S,
    # stages.NAME.KEY, whatever the name
    "stages.tokens": MOST_TOKENS,
    "stages.batch_tokens": 2**40,
    "stages.seq_len": 2**30,
    "stages.topk": 2**20,
    "stages.global_batch_size": 2**24,
    "stages.alternate.seq_len": 2**30,
    "stages.alternate.global_batch_size": 2**24,
    "stages.parallel.cp_size": 2**20,
    "stages.parallel.ep_size": 2**20,
    **{f"stages.parallel.{name}": 2**16 for name in ("cp_head_size", "tp_size", "pp_size")},
}


def check_sizes(config: RunConfig) -> None:
    """Check every whole number of a configuration against its limit, and what some of them make together.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for name, value in _whole_numbers(config, ""):
        parts = name.split(".")
        # stages have names of the user's, so their keys are looked up without them
        key = name if parts[0] != "stages" else ".".join(["stages", *parts[2:]])
        # keys of DeepSpeed's own, whatever they are
        limit = MOST_TOKENS if name.startswith("deepspeed.raw.") else LIMITS.get(key, COUNT)
        check_size(name, value, limit)
    for name, seq_len in _seq_lens(config):
        if seq_len // config.attention.block_size > MOST_BLOCKS:
            raise ValueError(
                f"{name}={seq_len}: must be at most {MOST_BLOCKS} blocks of attention.block_size="
                f"{config.attention.block_size}; use a shorter pack or larger blocks"
            )


def check_total(config: RunConfig) -> None:
    """Check the tokens of the whole run, which are counted in 64 bits. After the rules about stages.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    last = plan_stages(config)[-1]
    tokens = last.tokens_at(last.last_step)
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"train.steps={last.last_step}: makes {tokens:.3g} tokens with train.global_batch_size="
            f"{last.global_batch_size} packs of {last.seq_len}; must be at most {MOST_TOKENS:.3g}, use fewer "
            "steps"
        )


def check_size(name: str, value: int, limit: int) -> None:
    """Check one number.

    Raises:
        ValueError: where it is above the limit, or as far below 0.
    """
    if abs(value) > limit:
        # thousands of digits are no help, and Python refuses to write them
        shown = value if abs(value) < 10**30 else "a number of more than 30 digits"
        bound = f"at most {limit}" if value > 0 else f"at least {-limit}"
        raise ValueError(f"{name}={shown}: must be {bound}; correct it")


def _whole_numbers(config: object, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield every whole number with its dotted key, e.g. ("model.num_layers", 3)."""
    # true is an int in Python, and no size
    if isinstance(config, bool):
        return
    if isinstance(config, int):
        yield prefix.removesuffix("."), config
    elif is_dataclass(config):
        for item in fields(config):
            yield from _whole_numbers(getattr(config, item.name), f"{prefix}{item.name}.")
    elif isinstance(config, dict):
        for key, value in cast(dict[str, object], config).items():
            yield from _whole_numbers(value, f"{prefix}{key}.")


def _seq_lens(config: RunConfig) -> Iterator[tuple[str, int]]:
    yield "data.seq_len", config.data.seq_len
    for name, stage in config.stages.items():
        yield f"stages.{name}.seq_len", stage.seq_len
        yield f"stages.{name}.alternate.seq_len", stage.alternate.seq_len
