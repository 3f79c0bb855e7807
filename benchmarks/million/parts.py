"""Say which part of a step a rank was in, from the stacks that py-spy saw."""

from collections import Counter
from collections.abc import Iterable, Mapping

STEP = "train_step"
"function that a step is in"
REST = "rest"
# the innermost frame that one of these is in decides; a frame is "function (path:line)"
PARTS: Mapping[str, tuple[str, ...]] = {
    "scoring and selection": ("msa_kernels/select_blocks",),
    "index branch's loss": ("msa_kernels/indexer_kl", "msa_kernels/dense_kl"),
    "sparse attention": ("msa_kernels/block_sparse_attention",),
    "full attention": ("msa_kernels/full_attention",),
    "exchange": ("parallel/kv_exchange", "parallel/comm", "parallel/sharding", "distributed_c10d"),
    "experts": ("layers/moe", "transformer/moe"),
    "head and loss": ("layers/cross_entropy",),
    "optimizer": ("training/optim",),
}


def part_of(stack: str) -> str | None:
    """Find the part of a stack of py-spy's raw format, outermost frame first; None outside of a step.

    Example: "main (worker.py:9);Engine.train_step (engine.py:3);score (msa_kernels/select_blocks/op.py:1)" ->
    "scoring and selection".
    """
    frames = stack.split(";")
    # methods have their class before their name
    if not any(f"{STEP} (" in frame for frame in frames):
        return None
    for frame in reversed(frames):
        for part, places in PARTS.items():
            if any(place in frame for place in places):
                return part
    return REST


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Compute each part's share of the looks, largest first, from lines "stack count".

    Raises:
        ValueError: no look found a rank in a step.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        part = part_of(stack)
        if part is not None:
            counts[part] += int(count)
    total = counts.total()
    if not total:
        raise ValueError("py-spy saw no step")
    return {part: count / total for part, count in counts.most_common()}
