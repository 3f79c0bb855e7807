"""Time the layers of a model on one rank, part by part: attention by `msa_train.simulate`, the rest by rates.

A scenario of 1M tokens on 64 ranks takes the simulation 1 to 3 s; everything else is arithmetic.
"""

from dataclasses import dataclass, field, replace

from msa_train.config import AttentionKind, KvExchange, RunConfig
from msa_train.parallel.kv_exchange.slices.begin import num_query_slices
from msa_train.plan.assumptions import Assumptions
from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.layer_costs import SchemeReport
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR, LayerShape
from msa_train.simulate.inputs.rates import KernelRates
from msa_train.simulate.inputs.scenario import FullScheme, Options, Scenario, Scheme, equal_documents
from msa_train.simulate.layer_time import stated_selections
from msa_train.simulate.study import Answer, answer

PARTS = (
    *("scoring", "sparse attention", "dense attention", "projections", "experts", "feed-forward"),
    *("exchange", "dispatch", "tensor parallel", "head", "other"),
)
"of a layer's or a stage's seconds, in the order of reports"


@dataclass(slots=True)
class PassSeconds:
    """Hold seconds by part."""

    forward: dict[str, float] = field(default_factory=dict[str, float])
    "of the forward pass"
    backward: dict[str, float] = field(default_factory=dict[str, float])
    "of the backward pass, recomputation left out"

    def add(self, part: str, forward: float, backward: float) -> None:
        """Add seconds to a part."""
        self.forward[part] = self.forward.get(part, 0.0) + forward
        self.backward[part] = self.backward.get(part, 0.0) + backward


@dataclass(slots=True)
class Machine:
    """Hold what computes and what connects."""

    cluster: Cluster
    "links"
    rates: KernelRates
    "FLOP/s of kernels"


class LayerTimes:
    """Time layers of one configuration; each kind is computed once."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        assumed: Assumptions,
        known: dict[object, Answer] | None = None,
    ) -> None:
        """Take what is asked.

        Args:
            config: the run.
            machine: links and kernels.
            assumed: what arithmetic cannot know.
            known: answers of earlier layouts, which a search shares; added to.
        """
        self.config, self.machine, self.assumed = config, machine, assumed
        self._known = {} if known is None else known
        model, parallel = config.model, config.parallel
        self.tokens = config.data.seq_len // parallel.cp_size
        "T, of a rank"
        whole = LayerShape.of(model, config.attention, trains_index=config.attention.kl_weight > 0)
        # tensor parallelism cuts the heads
        self.shape = replace(
            whole,
            num_heads=model.num_heads // parallel.tp_size,
            num_kv_heads=model.num_kv_heads // parallel.tp_size,
        )
        self.answer = self._simulate()

    def layer(self, index: int) -> PassSeconds:
        """Time one layer, from 0 on: attention and feed-forward part."""
        kind = self.config.model.attention_kinds()[index]
        seconds = self._full_attention() if kind is AttentionKind.full else self._msa(kind)
        if index < self.config.model.num_dense_ffn_layers:
            self._dense_ffn(seconds)
        else:
            self._experts(seconds)
        self._tensor_parallel(seconds)
        # norms and residual sums read and write the hidden states about ten times
        moved = 10 * self.tokens * self.config.model.hidden_size * 2 / self.config.parallel.tp_size
        self._both(seconds, "other", moved / self.assumed.memory_bytes_s, 2.0)
        return seconds

    def head(self) -> PassSeconds:
        """Time output and loss: one product forward, the same again and two more backward."""
        model, seconds = self.config.model, PassSeconds()
        flops = 2.0 * self.tokens * model.hidden_size * model.vocab_size / self.config.parallel.tp_size
        self._both(seconds, "head", flops / self.machine.rates.projection_flops, 3.0)
        return seconds

    def _simulate(self) -> Answer:
        """Ask the simulation for an MSA and a full-attention layer of this layout."""
        config = self.config
        parallel = config.parallel
        key = (config.data.seq_len, parallel.cp_size, parallel.cp_head_size, parallel.tp_size,
               parallel.cp_layout, self._schemes(), self.assumed.f, self.assumed.num_docs)  # fmt: skip
        if key not in self._known:
            scenario = self._scenario()
            self._known[key] = answer(scenario, stated_selections(scenario, self.assumed.f))
        return self._known[key]

    def _scenario(self) -> Scenario:
        config, parallel = self.config, self.config.parallel
        documents = None
        if self.assumed.num_docs > 1:
            documents = equal_documents(
                self.assumed.num_docs, config.data.seq_len, config.attention.block_size
            )
        # ranks of a tensor-parallel group are neighbours: a node has fewer places of the sequence
        per_node = max(1, self.machine.cluster.gpus_per_node // parallel.tp_size)
        return Scenario(
            shape=self.shape,
            cluster=replace(self.machine.cluster, gpus_per_node=per_node),
            rates=self.machine.rates,
            seq_len=config.data.seq_len,
            cp_size=parallel.cp_size,
            layout=parallel.cp_layout.value,
            cu_seqlens=documents,
            schemes=list(self._schemes()),
            full_schemes=[FullScheme.all_gather, FullScheme.ring],
            options=Options(
                keep_for_backward=config.exchange.keep_for_backward,
                overlap=config.exchange.overlap,
                hot_share=config.exchange.hot_share,
                head_size=parallel.cp_head_size,
                query_slices=num_query_slices(
                    config.exchange,
                    parallel.kv_exchange,
                    parallel.cp_size // parallel.cp_head_size,
                    self.tokens * parallel.cp_head_size,
                ),
            ),
            index_balance=parallel.balance_index,
        )

    def _schemes(self) -> tuple[Scheme, ...]:
        """Name the scheme of the simulation that this configuration uses."""
        kind = self.config.parallel.kv_exchange
        if kind is KvExchange.all_gather:
            # training starts it before the scoring
            return (Scheme.all_gather_early,)
        if kind is KvExchange.ring:
            return (Scheme.ring,)
        if kind is KvExchange.auto:
            return (Scheme.auto,)
        return (Scheme.selected_hierarchical if self.config.exchange.ranks_per_node else Scheme.selected,)

    def _msa(self, kind: AttentionKind) -> PassSeconds:
        """Time a sparse layer; what the simulation finds beyond computing is the exchange's."""
        assert kind is AttentionKind.msa, "sliding windows are not simulated"
        seconds, shape, rates = PassSeconds(), self.shape, self.machine.rates
        report = next(iter(self.answer.msa.values()))
        tiles = self.tokens * shape.topk
        pairs = self._visible_pairs()
        projections = (
            shape.qkv_flops(self.tokens)
            + shape.output_flops(self.tokens)
            + shape.index_projection_flops(self.tokens)
        ) / rates.projection_flops
        sparse = shape.sparse_flops(float(tiles))
        forward_s = sparse / rates.sparse_forward_flops
        backward_s = BACKWARD_FACTOR * sparse / rates.sparse_backward_flops
        if shape.trains_index:
            backward_s += shape.kl_flops(float(tiles)) / rates.kl_flops
        seconds.add("projections", projections, 2 * projections)
        seconds.add("scoring", shape.index_flops(pairs) / rates.index_flops, 0.0)
        seconds.add("sparse attention", forward_s, backward_s)
        seconds.add("other", rates.layer_overhead_s, rates.layer_overhead_s)
        self._rest(seconds, "exchange", report)
        return seconds

    def _full_attention(self) -> PassSeconds:
        """Time a full-attention layer by the faster of gather and ring."""
        seconds, shape, rates = PassSeconds(), self.shape, self.machine.rates
        report = min(self.answer.full.values(), key=lambda scheme: scheme.total.total)
        flops = shape.full_flops(self._visible_pairs())
        projections = (
            shape.qkv_flops(self.tokens) + shape.output_flops(self.tokens)
        ) / rates.projection_flops
        seconds.add("projections", projections, 2 * projections)
        seconds.add(
            "dense attention",
            flops / rates.full_forward_flops,
            BACKWARD_FACTOR * flops / rates.full_backward_flops,
        )
        seconds.add("other", rates.layer_overhead_s, rates.layer_overhead_s)
        self._rest(seconds, "exchange", report)
        return seconds

    def _visible_pairs(self) -> float:
        """Return the causal (query, key) pairs of a rank, mean over ranks: half a document per query."""
        return self.tokens * self.config.data.seq_len / self.assumed.num_docs / 2

    def _rest(self, seconds: PassSeconds, part: str, report: SchemeReport) -> None:
        """Give what a report's total has beyond the parts so far to one more part."""
        forward = max(0.0, report.forward.total - sum(seconds.forward.values()))
        backward = max(0.0, report.backward.total - sum(seconds.backward.values()))
        seconds.add(part, forward, backward)

    def _dense_ffn(self, seconds: PassSeconds) -> None:
        model = self.config.model
        flops = 6.0 * self.tokens * model.hidden_size * model.ffn_hidden_size / self.config.parallel.tp_size
        self._both(seconds, "feed-forward", flops / self.machine.rates.projection_flops, 2.0)

    def _experts(self, seconds: PassSeconds) -> None:
        """Time shared and routed experts, and the rows that travel to them and back."""
        model, parallel, rates = self.config.model, self.config.parallel, self.machine.rates
        shared = 6.0 * self.tokens * model.hidden_size * model.shared_expert_hidden_size / parallel.tp_size
        self._both(seconds, "feed-forward", shared / rates.projection_flops, 2.0)
        # tensor-parallel ranks hold different tokens in front of the experts
        rows = self.tokens / parallel.tp_size * model.moe_router_topk
        flops = 6.0 * rows * self.assumed.imbalance * model.hidden_size * model.moe_ffn_hidden_size
        experts = flops / (rates.projection_flops * self.assumed.gemm_efficiency)
        self._both(seconds, "experts", experts, 2.0)
        wire = dispatch_seconds(rows, model.hidden_size, parallel.ep_size, self.machine.cluster)
        # there and back, forward; their gradients there and back, backward
        hidden = self._hidden_share()
        exposed = max(2 * wire - hidden * experts, 2 * wire * (1 - hidden))
        exposed_back = max(2 * wire - hidden * 2 * experts, 2 * wire * (1 - hidden))
        seconds.add("dispatch", exposed, exposed_back)

    def _hidden_share(self) -> float:
        """Return the share of the dispatch that may travel under the experts' computing: all tiles but one.

        Example: tiles of 4,096 of 16,384 tokens -> 3 of 4.
        """
        tile = self.config.train.tile_tokens
        if not tile or tile >= self.tokens:
            return 0.0
        return 1.0 - tile / self.tokens

    def _tensor_parallel(self, seconds: PassSeconds) -> None:
        """Time gathers and scatters of hidden states in tensor-parallel groups: two of each per pass."""
        size = self.config.parallel.tp_size
        if size == 1:
            return
        shard = self.tokens / size * self.config.model.hidden_size * 2
        one = collective_cost.all_gather(shard, size, self.machine.cluster).time_s(self.machine.cluster)
        self._both(seconds, "tensor parallel", 4 * one, 1.0)

    def _both(self, seconds: PassSeconds, part: str, forward: float, factor: float) -> None:
        seconds.add(part, forward, factor * forward)


def dispatch_seconds(rows: float, hidden_size: int, ep_size: int, cluster: Cluster) -> float:
    """Time one way of rows to their experts: bf16, evenly spread over ep_size ranks.

    Example: 65,536 rows of 6,144 numbers to 64 ranks on 8 nodes: 7 of 8 leave the node, 705 MB at 40 GB/s ->
    18 ms.
    """
    if ep_size == 1:
        return 0.0
    per_node = min(ep_size, cluster.gpus_per_node)
    num_bytes = rows * hidden_size * 2
    inside = num_bytes * (per_node - 1) / ep_size / cluster.node_rate + cluster.node_latency_s
    if ep_size <= per_node:
        return inside
    outside = num_bytes * (ep_size - per_node) / ep_size / cluster.network_rate + cluster.network_latency_s
    # two kinds of links carry their parts at the same time
    return max(inside, outside)
