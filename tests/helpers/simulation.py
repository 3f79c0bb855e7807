"""Small questions for the simulator."""

from dataclasses import replace
from typing import Any

from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.rates import KernelRates, load_rates
from msa_train.simulate.inputs.scenario import Options, Scenario, Scheme
from msa_train.simulate.selections.synthetic import SyntheticSelections

M3 = LayerShape(
    hidden_size=6144,
    num_heads=64,
    num_kv_heads=4,
    head_dim=128,
    index_head_dim=128,
    block_size=128,
    topk=16,
)


def flat_cluster(**changes: Any) -> Cluster:
    """One rank per node, no latencies, full rates: closed formulas hold."""
    values: dict[str, Any] = {
        "name": "flat",
        "gpus_per_node": 1,
        "node_rate_bytes": 1e9,
        "network_rate_bytes": 1e9,
        "node_latency_s": 0.0,
        "network_latency_s": 0.0,
        "host_sync_s": 0.0,
    }
    return Cluster(**{**values, **changes})


def rates(**changes: Any) -> KernelRates:
    """Those of the H100 file, some changed."""
    return replace(load_rates("h100_assumed"), **changes)


def scenario(**changes: Any) -> Scenario:
    """64K tokens on 8 ranks of a flat cluster, no hot pairs."""
    values: dict[str, Any] = {
        "shape": M3,
        "cluster": flat_cluster(),
        "rates": rates(),
        "seq_len": 65536,
        "cp_size": 8,
        "schemes": [s for s in Scheme if s is not Scheme.auto],
        "full_schemes": [],
        "options": Options(hot_share=0.0),
        "index_balance": False,
    }
    return Scenario(**{**values, **changes})


def stated(f: float, **changes: Any) -> SyntheticSelections:
    """M3's selections with this f."""
    return SyntheticSelections(num_kv_heads=4, topk=16, f=f, **changes)


def alike(tokens: int, **changes: Any) -> SyntheticSelections:
    """M3's selections of runs of so many tokens."""
    return SyntheticSelections(num_kv_heads=4, topk=16, alike_tokens=tokens, **changes)
