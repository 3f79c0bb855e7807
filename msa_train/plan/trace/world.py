"""Be one rank of a job of any size, alone: groups that exist by name, ranks that all say the same."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from msa_train.config import RunConfig
from msa_train.parallel.comm import topology
from msa_train.parallel.comm.link_rates import ExchangeRates, Line
from msa_train.parallel.process_groups import Groups, build_groups

_RATES = ExchangeRates(*[Line(20e-6, 1 / 40e9)] * 5)
"of links that nobody measures here; they decide between ways of the exchange where `auto` is asked for"


class _Watch:
    """Stand for the watch over other ranks."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def joined(
    config: RunConfig, world_size: int, rank: int, device: torch.device, ranks_per_machine: int
) -> Iterator[Groups]:
    """Join as `rank` of `world_size`; what is sent goes nowhere, what others say is what this rank says."""
    new_group = distributed_c10d.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": "fake"}))

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks_per_machine)))
        for module in (dist, distributed_c10d):
            for name, value in (
                ("new_group", fake_group),
                ("all_gather_object", _all_gather_object),
                ("batch_isend_irecv", lambda operations: []),
                ("barrier", lambda *_, **__: None),
            ):
                stack.enter_context(patch.object(module, name, value))
        stack.enter_context(patch.object(topology, "measure_rates", lambda _comm: _RATES))
        try:
            groups = build_groups(config.parallel, device=device, exchange=config.exchange, watch=_Watch())  # type: ignore[arg-type]
            yield groups
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)
