"""Save one checkpoint by itself."""

from typing import Any

import torch.distributed as dist

from msa_train.checkpoint.save import CheckpointSaver
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import CheckpointConfig


def save_checkpoint(
    store: CheckpointStore,
    *,
    step: int,
    sharded_state: dict[str, Any],
    common: dict[str, Any],
    meta: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write and publish one checkpoint and wait for it; see CheckpointSaver.save. Removes no older one.

    Raises:
        CheckpointError: naming the rank and the cause; no folder is published then.
    """
    config = CheckpointConfig(asynchronous=False, keep_last=0)
    CheckpointSaver(store, config, group or dist.group.WORLD).save(step, sharded_state, common, meta)
