"""Begin what can travel before a layer's selection is complete, where it is known beforehand what that is."""

from dataclasses import dataclass

from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.choose import kv_block_bytes
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes
from msa_train.parallel.kv_exchange.plan import Demand, ExchangeShape
from msa_train.parallel.kv_exchange.requests import (
    ExchangeDecision,
    agree,
    kv_blocks_by_owner,
    request_shape,
    start_request,
)
from msa_train.parallel.kv_exchange.slices.last_call import Choices, LastCall
from msa_train.parallel.kv_exchange.slices.side_stream import beside, mark
from msa_train.parallel.kv_exchange.slices.sliced_fetch import SlicedFetch
from msa_train.parallel.sharding.shard_layout import ShardLayout


@dataclass(slots=True)
class EarlyGather:
    """Gather all keys and values from before the scoring on."""

    local: Tensor
    "[M * NL, 2, B, D] own keys and values by KV block"
    gathered: Pending[Tensor]
    "[P, M * NL, 2, B, D] of all ranks"
    asks: "_Asks | None"
    "tells `auto` afterwards what selected KV blocks would have cost; None: nobody wants to know"

    def decide(self) -> ExchangeDecision:
        """Tell how KV blocks come."""
        return ExchangeDecision(KvExchange.all_gather)

    def selected(self, needed: Tensor) -> None:
        """Hear what was selected: [M, NB] bool; under `auto` all ranks are told, for the next call."""
        if self.asks is not None:
            self.asks.start(needed)


Begun = EarlyGather | SlicedFetch
# Tokens of a rank that are worth a slice, and the most slices that the rule makes: in the simulation of 1M
# tokens on 64 ranks 4 hide nearly all that can be hidden.
_SLICE_TOKENS, _MOST_SLICES = 4096, 4


def num_query_slices(
    settings: ExchangeConfig, kind: KvExchange, cp_size: int, local_tokens: int, unit: int = 1
) -> int:
    """Decide in how many slices queries select; the same on all ranks.

    Args:
        settings: of the exchange; `query_slices` says it, or 0.
        kind: way of the exchange.
        cp_size: ranks between which KV blocks travel.
        local_tokens: of each of them.
        unit: tokens that stay together.

    Example: by rule 1 up to 8,191 tokens a rank, 2 from 8,192 on, 4 from 16,384 on.
    """
    if cp_size == 1 or kind in (KvExchange.all_gather, KvExchange.ring):
        return 1
    wanted = settings.query_slices
    if wanted == 0:
        wanted = min(_MOST_SLICES, local_tokens // _SLICE_TOKENS) if settings.overlap else 1
    return max(1, min(wanted, local_tokens // unit))


@dataclass(slots=True)
class _Asks:
    """Gather requests that nobody serves, so that `auto` knows the loads in the layer's next call."""

    comm: KvComm
    "of the layer"
    layout: ShardLayout
    "this rank's shard"
    choices: Choices
    "what is counted"
    pending: Pending[Tensor] | None = None
    "requests of all ranks"

    def start(self, needed: Tensor) -> None:
        """Begin to gather; it travels under attention."""
        wanted = kv_blocks_by_owner(needed, self.layout)
        self.pending = start_request(wanted, self.choices.flat, self.comm, (None, None))
        self.comm.calls[self.comm.layer] = self

    def read(self) -> LastCall:
        """Count the loads, as if everything had been sent."""
        assert self.pending is not None, "it was started"
        # Beside the main stream: the host waits for a gather of the last step, not for what is queued now.
        with beside(self.comm.device, mark(self.comm.device)):
            agreed = agree(
                self.pending.wait(), self.choices.flat, self.layout.cp_rank, self.comm, more=self._loads
            )
        return LastCall.read(agreed.more, self.choices)

    def _loads(self, demand: Demand) -> Tensor:
        return self.choices.loads(demand.bits, demand.hot)


def begin_exchange(
    kind: KvExchange,
    local: Tensor,
    k_index: Tensor,
    layout: ShardLayout,
    comm: KvComm,
    settings: ExchangeConfig,
    *,
    num_slices: int,
    with_backward: bool,
) -> Begun | None:
    """Begin a layer's exchange before its queries are scored.

    Args:
        kind: way of the exchange, as configured.
        local: [M * NL, 2, B, D] own keys and values by KV block, detached.
        k_index: [T, Di] own index keys.
        layout: this rank's shard.
        comm: ranks between which KV blocks travel, of this layer.
        settings: of the exchange.
        num_slices: slices in which queries will select.
        with_backward: gradients will come back.

    Returns:
        What has begun; None where everything waits for the selection: in a ring, and in one slice.

    Raises:
        ExchangeError: a collective failed.
    """
    if layout.cp_size == 1 or kind is KvExchange.ring:
        return None
    if kind is KvExchange.all_gather:
        return EarlyGather(local, comm.start_all_gather(local, "kv"), None)
    num_kv_heads = local.shape[0] // layout.num_local_blocks
    shape, choices = request_shape(num_kv_heads, layout, comm, settings), None
    if num_slices == 1:
        # In one piece `auto` chooses when it knows the requests.
        return None
    if kind is KvExchange.auto:
        choices = choices_of(num_kv_heads, layout, comm, settings)
        size = kv_block_bytes(local, k_index, layout, with_backward=with_backward)
        kind, shape = _choose(choices, shape, size, comm, settings)
        if kind is KvExchange.all_gather:
            gathered = comm.start_all_gather(local, "kv")
            return EarlyGather(local, gathered, _Asks(comm, layout, choices))
    return SlicedFetch(local, shape, layout, comm, k_index, num_slices, choices)


def choices_of(num_kv_heads: int, layout: ShardLayout, comm: KvComm, settings: ExchangeConfig) -> Choices:
    """List the shapes that `auto` chooses between."""
    flat = request_shape(num_kv_heads, layout, comm, settings, by_node=False)
    nodes = request_shape(num_kv_heads, layout, comm, settings)
    return Choices(flat, nodes if nodes.hierarchical else None)


def _choose(
    choices: Choices, first: ExchangeShape, size: KvBlockBytes, comm: KvComm, settings: ExchangeConfig
) -> tuple[KvExchange, ExchangeShape]:
    """Choose by the last call of the layer; in its first call selected KV blocks travel."""
    last = comm.calls.get(comm.layer)
    if isinstance(last, _Asks):
        last = comm.calls[comm.layer] = last.read()
    if last is None:
        return KvExchange.selected, first
    assert isinstance(last, LastCall), "calls are kept by this module alone"
    assert comm.rates is not None, "auto measures rates when the groups are built"
    return last.choose(choices, size, comm.rates, settings)
