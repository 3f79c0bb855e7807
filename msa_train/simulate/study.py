"""Time every scheme's layers for one scenario, and follow their speed as ranks are added.

Cost: the replay asks each of P ranks for [M, NB] blocks and plans on P^2 * W bytes of bitmaps, so 4M tokens
on 256 ranks take 33M selected-or-not flags and 4 MiB of bitmaps per scenario; all schemes share them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from msa_train.simulate.costs.demand import collect_wants
from msa_train.simulate.costs.full_layer import FullLayer
from msa_train.simulate.costs.layer_costs import LayerCosts, SchemeReport
from msa_train.simulate.costs.msa_layer import MsaLayer, MsaWork
from msa_train.simulate.inputs.layouts import share_index
from msa_train.simulate.inputs.scenario import Scenario
from msa_train.simulate.selections.recorded import Selections

BASE_RANKS = 8
"scaling is told relative to this many ranks"


@dataclass(slots=True)
class Answer:
    """Hold the reports of all schemes, by layer kind."""

    scenario: Scenario
    "asked"
    selections: str
    "one line about them"
    f: float
    "share of remote KV blocks selected, mean over ranks, 0 to 1"
    local_share: float
    "share of (query, block) pairs whose block is local, mean over ranks, 0 to 1"
    index_balance: float
    "largest rank's index scoring work over the mean, at least 1"
    msa: dict[str, SchemeReport]
    "of an MSA layer, by scheme"
    full: dict[str, SchemeReport]
    "of a full-attention layer, by scheme; empty where none is asked"


def answer(scenario: Scenario, selections: Selections) -> Answer:
    """Replay the selections and time every scheme."""
    layer = layer_of(scenario, selections)
    index = share_index(layer.setup.outer, balanced=scenario.index_balance)
    return Answer(
        scenario=scenario,
        selections=selections.describe(),
        f=layer.work.wants.f,
        local_share=float(layer.work.local_share.mean()),
        index_balance=index.balance,
        msa={scheme.value: layer.report(scheme) for scheme in scenario.schemes},
        full=_full(scenario),
    )


def layer_of(scenario: Scenario, selections: Selections) -> MsaLayer:
    """Make the model of an MSA layer whose queries select so."""
    outer = scenario.placement()
    setup = LayerCosts(
        shape=scenario.shape,
        cluster=scenario.cluster,
        rates=scenario.rates,
        cp_size=scenario.cp_size,
        options=scenario.options,
        outer=outer,
    )
    # both follow from the placement alone: scoring sees all blocks before a query, selected or not
    index, local = share_index(outer, balanced=scenario.index_balance), selections.local_share(outer)
    work = MsaWork(
        tiles=outer.tiles(scenario.shape.topk),
        wants=collect_wants(selections, outer, scenario.shape.num_kv_heads, scenario.options.head_size),
        local_share=local,
        index_scores=index.work,
        index_moved=index.moved,
    )
    return MsaLayer(setup, work)


def _full(scenario: Scenario) -> dict[str, SchemeReport]:
    """Time full-attention layers, which have no Ulysses groups: all ranks are one ring or gather."""
    if not scenario.full_schemes:
        return {}
    setup = LayerCosts(
        shape=scenario.shape,
        cluster=scenario.cluster,
        rates=scenario.rates,
        cp_size=scenario.cp_size,
        options=replace(scenario.options, head_size=1),
        outer=scenario.placement(head_size=1),
    )
    layer = FullLayer(setup)
    return {scheme.value: layer.report(scheme) for scheme in scenario.full_schemes}


@dataclass(slots=True)
class ScalePoint:
    """Hold one size of a scaling curve."""

    cp_size: int
    "P"
    seq_len: int
    "tokens of the pack"
    f: float
    "share of remote KV blocks selected, 0 to 1"
    efficiency: dict[str, float]
    "by scheme, computing's share of the layer's time, mean over ranks, 0 to 1"
    kept: dict[str, float]
    "by scheme, efficiency over that at BASE_RANKS"
    tokens_per_s: dict[str, float]
    "by scheme, tokens per second of one rank through one layer, forward and backward"


def scaling(
    scenario: Scenario, selections: Callable[[Scenario], Selections], sizes: Sequence[int], *, weak: bool
) -> list[ScalePoint]:
    """Follow the speed from BASE_RANKS ranks on.

    Weak: each rank keeps its number of tokens, the sequence grows with the ranks. Strong: the sequence stays.
    Speed is work done per rank and second, so that more work per token at longer sequences does not count as
    loss: with fixed kernel rates that is computing's share of the time. Example: 8 of 10 ms compute on 8
    ranks, 9 of 15 ms on 64: efficiency 0.8 and 0.6, kept 1 and 0.75.

    Args:
        scenario: its seq_len and cp_size give the tokens per rank (weak) or the sequence (strong).
        selections: makes the selections of a scenario.
        sizes: numbers of ranks, ascending; BASE_RANKS is put first.
        weak: which of the two.
    """
    points: list[ScalePoint] = []
    tokens = scenario.seq_len // scenario.cp_size
    for size in [BASE_RANKS, *(s for s in sizes if s > BASE_RANKS)]:
        at = replace(
            scenario, cp_size=size, seq_len=tokens * size if weak else scenario.seq_len, full_schemes=[]
        )
        result = answer(at, selections(at))
        # at fixed kernel rates, time without waiting is compute: its share is what parallel work keeps
        efficiency = {name: r.total.compute / r.total.total for name, r in result.msa.items()}
        base = points[0].efficiency if points else efficiency
        points.append(
            ScalePoint(
                cp_size=size,
                seq_len=at.seq_len,
                f=result.f,
                efficiency=efficiency,
                kept={name: value / base[name] for name, value in efficiency.items()},
                tokens_per_s={name: at.seq_len / size / r.total.total for name, r in result.msa.items()},
            )
        )
    return points
