"""Time how long a step computes over own blocks, while keys and values travel, and over the others."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from msa_train.parallel.attention import cp_sparse as layer
from msa_train.parallel.sharding.shard_layout import ShardLayout

NAMES = ("forward_own", "forward_others", "backward_own", "backward_others")


@contextmanager
def timed_sources(layout: ShardLayout) -> Iterator[dict[str, float]]:
    """Collect CPU seconds of this thread by NAMES, complete when the context ends.

    Args:
        layout: of this rank's blocks.
    """
    seconds = dict.fromkeys(NAMES, 0.0)
    own = set(layout.own_blocks(torch.device("cpu")).tolist())
    originals = layer.pool_forward, layer.pool_backward

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(queries: Any, pool: Any, *arguments: Any, **options: Any) -> Any:
            begin = time.thread_time()
            result = function(queries, pool, *arguments, **options)
            whose = "own" if own.issuperset(pool.block.tolist()) else "others"
            seconds[f"{name}_{whose}"] += time.thread_time() - begin
            return result

        return call

    layer.pool_forward, layer.pool_backward = timed(originals[0], "forward"), timed(originals[1], "backward")
    try:
        yield seconds
    finally:
        layer.pool_forward, layer.pool_backward = originals
