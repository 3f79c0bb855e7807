"""Tell the seconds of one MSA layer by part, for whoever plans a run: nothing but numbers in and out."""

from dataclasses import dataclass

import numpy as np

from msa_train.simulate.costs.layer_costs import SchemeReport
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.rates import KernelRates
from msa_train.simulate.inputs.scenario import Options, Scenario, Scheme
from msa_train.simulate.selections.synthetic import SyntheticSelections
from msa_train.simulate.study import layer_of


@dataclass(slots=True, frozen=True)
class LayerParts:
    """Hold the seconds of one layer call, forward and backward, of the rank that is last.

    total = projections + scoring + sparse + copying + exposed + waiting.
    """

    projections_s: float
    "query, key, value, index and output projections, and what no size explains"
    scoring_s: float
    "index scores and top-k, mean over ranks"
    sparse_s: float
    "attention to the selected blocks with the KL loss, mean over ranks"
    copying_s: float
    "packing, unpacking and adding rows, mean over ranks"
    exposed_s: float
    "transfers that computing does not hide"
    waiting_s: float
    "for slower ranks"
    forward_s: float
    "of the forward pass, all parts"
    backward_s: float
    "of the backward pass, all parts"
    exposed_by: dict[str, float]
    "exposed_s by collective"
    received_bytes: float
    "per rank, mean"
    memory_bytes: float
    "largest buffers of the exchange, gathered index keys included"
    scheme: Scheme
    "the way that was taken: what `auto` chose"

    @property
    def total_s(self) -> float:
        """Return the seconds of both passes."""
        return self.forward_s + self.backward_s


def msa_layer_parts(
    shape: LayerShape,
    cluster: Cluster,
    rates: KernelRates,
    *,
    seq_len: int,
    cp_size: int,
    f: float,
    scheme: Scheme = Scheme.auto,
    options: Options | None = None,
    layout: str = "contiguous",
    cu_seqlens: list[int] | None = None,
) -> LayerParts:
    """Time one MSA layer.

    Args:
        shape: of the layer.
        cluster: links of the ranks.
        rates: of the kernels.
        seq_len: tokens of the pack.
        cp_size: ranks that share it.
        f: share of the remote KV blocks that a rank selects; more than its queries can see is cut to that.
        scheme: of the exchange.
        options: switches of the exchange, Ulysses degree, slices of queries; None: `Options()`.
        layout: of the sequence.
        cu_seqlens: [num_docs + 1] block-aligned document starts and seq_len; None: one document.

    Cost: about 1 s of a CPU core for 1M tokens on 64 ranks, 10 s for 4M on 256 (measured).

    Raises:
        ValueError: as of Scenario.
    """
    scenario = Scenario(
        shape=shape,
        cluster=cluster,
        rates=rates,
        seq_len=seq_len,
        cp_size=cp_size,
        layout=layout,
        cu_seqlens=cu_seqlens,
        schemes=[scheme],
        full_schemes=[],
        options=options or Options(),
    )
    layer = layer_of(scenario, stated_selections(scenario, f))
    report = layer.report(scheme)
    passes = 2 if scenario.options.recompute else 1
    scoring = float(np.mean(layer.index_s))
    work = layer.attention
    sparse = float(np.mean(passes * work.forward.total + work.backward.total))
    return _parts(report, scoring, sparse, scheme)


def stated_selections(scenario: Scenario, f: float) -> SyntheticSelections:
    """Make up selections of the stated f, or of all that queries can see where that is less."""
    placement, shape = scenario.placement(), scenario.shape
    remote = placement.num_blocks - placement.num_blocks // placement.cp_size
    visible = float(placement.visible_remote().mean()) / max(remote, 1)
    return SyntheticSelections(
        num_kv_heads=shape.num_kv_heads,
        topk=shape.topk,
        local_blocks=shape.local_blocks,
        f=min(f, visible),
    )


def _parts(report: SchemeReport, scoring: float, sparse: float, scheme: Scheme) -> LayerParts:
    total = report.total
    return LayerParts(
        projections_s=total.compute - scoring - sparse,
        scoring_s=scoring,
        sparse_s=sparse,
        copying_s=total.copying,
        exposed_s=total.exposed,
        waiting_s=total.imbalance,
        forward_s=report.forward.total,
        backward_s=report.backward.total,
        exposed_by=dict(total.exposed_by),
        received_bytes=float(report.received.mean()),
        memory_bytes=report.memory_bytes,
        scheme=report.chosen or scheme,
    )
