"""Check the settings of the exchange between context-parallel ranks."""

from msa_train.config.options import KvExchange
from msa_train.config.run import RunConfig

MAX_QUERY_SLICES = 8
"more slices hide little more, and each costs a request and a host copy"


def check_exchange(config: RunConfig) -> None:
    """Refuse settings of the exchange that contradict the way it goes, or one another.

    Raises:
        ValueError: naming the key, the rule and a fix.
    """
    exchange, kind, cp_size = config.exchange, config.parallel.kv_exchange, config.parallel.cp_size
    if not 0 <= exchange.hot_share <= 1:
        raise ValueError(
            f"exchange.hot_share={exchange.hot_share}: must be from 0 (none) to 1 (what all others want)"
        )
    nodes = exchange.ranks_per_node
    if nodes < -1:
        raise ValueError(
            f"exchange.ranks_per_node={nodes}: must be a number of ranks; use 0 for none, -1 for a machine's"
        )
    if nodes > 0 and cp_size % nodes:
        raise ValueError(
            f"exchange.ranks_per_node={nodes}: must divide parallel.cp_size={cp_size}; use one of 0, "
            + ", ".join(str(n) for n in range(1, cp_size + 1) if cp_size % n == 0)
        )
    if nodes and kind in (KvExchange.all_gather, KvExchange.ring):
        raise ValueError(
            f"exchange.ranks_per_node={nodes}: is for parallel.kv_exchange=selected or auto; "
            "use exchange.ranks_per_node=0"
        )
    if not exchange.keep_for_backward and kind in (KvExchange.all_gather, KvExchange.ring):
        raise ValueError(
            f"exchange.keep_for_backward=false: parallel.kv_exchange={kind.value} keeps nothing anyway; "
            "use exchange.keep_for_backward=true"
        )
    slices = exchange.query_slices
    if not 0 <= slices <= MAX_QUERY_SLICES:
        raise ValueError(
            f"exchange.query_slices={slices}: must be from 0 (by rule) to {MAX_QUERY_SLICES}; use 0"
        )
    if slices > 1 and kind in (KvExchange.all_gather, KvExchange.ring):
        raise ValueError(
            f"exchange.query_slices={slices}: is for parallel.kv_exchange=selected or auto; "
            "use exchange.query_slices=0"
        )
