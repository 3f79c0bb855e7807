"""Define what a metric is: the words in which `registry` declares each of them once."""

from dataclasses import dataclass
from enum import Enum


class OverRanks(Enum):
    """Say how the ranks' numbers become one, in words of docs/metrics.md."""

    same = "the same on all"
    rank_0 = "rank 0's"
    sum = "sum"
    ratio = "ratio of sums"
    mean = "mean"
    max = "largest"


class Parts(Enum):
    """Say what a value is made of, and so what stands for the @ of its tag, in words of docs/metrics.md."""

    none = "a number"
    layers = '`{"layer03": number}`'
    groups = '`{"layer03": [number of each KV group]}`'
    distances = '`{"layer03": {"distance4": number or null}}`'
    purposes = '`{"kv": number}`'
    shares = '`{"books": number}`'
    keys = "`[key]`"


class Chart(Enum):
    """Name the charts of TensorBoard's Custom Scalars page, in their order: category and title."""

    loss = ("training", "loss")
    kl = ("training", "KL loss of the index branch")
    grad_norm = ("training", "gradient norm")
    lr = ("training", "learning rate")
    speed = ("training", "tokens per second")
    padding = ("training", "padding")
    lengths = ("training", "tokens by the length of their documents")
    selected = ("key/value exchange", "f: share of remote blocks selected, per layer and group")
    bytes_moved = ("key/value exchange", "bytes moved, and what an all-gather would move")
    waits = ("key/value exchange", "seconds that a rank waits, by purpose")
    block_recall = ("selection against full attention", "block recall")
    score_recall = ("selection against full attention", "score recall, and that of the best blocks")
    entropy = ("selection against full attention", "attention entropy (nats)")
    far_blocks = ("selection against full attention", "block recall by distance in blocks")
    far_scores = ("selection against full attention", "score recall of the best blocks by distance")
    busiest = ("experts", "tokens of the busiest expert, per layer")
    idlest = ("experts", "tokens of the idlest expert, per layer")
    router_bias = ("experts", "router bias, per layer")
    memory = ("machine", "memory")


class InSummary(Enum):
    """Say what summary.json keeps of a metric, by the ends of its fields."""

    nothing = ()
    first_and_last = ("first", "last")
    total = ("total",)
    last = ("last",)
    mean = ("mean",)
    last_as_it_is = ("",)


@dataclass(frozen=True, slots=True)
class Metric:
    """Declare one key of metrics.jsonl and all that follows from it."""

    key: str
    "in metrics.jsonl"
    meaning: str
    "one sentence for docs/metrics.md, without the full stop"
    unit: str
    "of its numbers"
    over_ranks: OverRanks
    tag: str
    "in TensorBoard; @ is where layer03, layer03_group1, layer03_distance4 or kv goes. Empty: not there"
    parts: Parts = Parts.none
    "what the value is made of"
    chart: Chart | None = None
    "that shows it"
    purpose: str = ""
    "of `CpComm` traffic that it counts"
    part_of: str = ""
    "key of the traffic that it is a part of"
    line: str = ""
    "how a line of the terminal tells it"
    in_summary: InSummary = InSummary.nothing
    "its fields in summary.json"
    title: str = ""
    "of its first and last value in the table at the end of a run"
