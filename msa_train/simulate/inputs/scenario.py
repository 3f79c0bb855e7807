"""Describe what is asked of the model: a layer, a cluster, a size, schemes. All is checked at the start."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.inputs.rates import KernelRates

MAX_SEQ_LEN = 10 * 2**20
MAX_CP_SIZE = 1024
MAX_QUERY_SLICES = 8


class Scheme(Enum):
    """Name the ways to bring keys and values of other ranks."""

    ring = "ring"  # shards pass by
    all_gather = "all_gather"  # all of them, twice; gradients reduce-scattered
    all_gather_early = "all_gather_early"  # the same, started before index scoring
    all_gather_all_reduce = "all_gather_all_reduce"  # all of them, kept; gradients all-reduced, then cut
    selected = "selected"  # the KV blocks that a local query selected, from their owners
    selected_hierarchical = "selected_hierarchical"  # the same, over the network once per node
    auto = "auto"  # what parallel.kv_exchange=auto chooses


class FullScheme(Enum):
    """Name the ways of full attention to keys and values; queries move for equal work unless it is said."""

    ring = "ring"  # shards pass by
    ring_unbalanced = "ring_unbalanced"  # the same, every rank computes the queries that it holds
    all_gather = "all_gather"  # all of them, in the backward pass again; gradients reduce-scattered
    all_gather_all_reduce = "all_gather_all_reduce"  # all of them, kept; gradients all-reduced
    selected = "selected"  # only the earlier part of the documents that a rank holds a piece of


@dataclass(kw_only=True, slots=True)
class Options:
    """Hold the switches of the exchange."""

    keep_for_backward: bool = True
    "fetched keys and values stay until the backward pass; else they are fetched again"
    overlap: bool = True
    "collectives run under computing where the model has it so"
    recompute: bool = False
    "the layer's forward pass runs again in the backward pass, selection and requests replayed"
    hot_share: float = 0.75
    "share of the other ranks that must want a KV block for it to be broadcast, 0 to 1; 0: none is"
    head_size: int = 1
    "u, Ulysses degree: ranks that trade tokens for heads before attention"
    query_slices: int = 1
    "slices of queries that select while the rows of the slice before travel; 1: everything at once"

    def __post_init__(self) -> None:
        if not 0 <= self.hot_share <= 1:
            raise ValueError(f"hot_share={self.hot_share}: must be from 0 (none is broadcast) to 1")
        if not 1 <= self.query_slices <= MAX_QUERY_SLICES:
            raise ValueError(f"query_slices={self.query_slices}: must be from 1 to {MAX_QUERY_SLICES}")


@dataclass(kw_only=True, slots=True)
class Scenario:
    """Hold what is asked.

    Raises:
        ValueError: if sizes are out of range or do not divide one another.
    """

    shape: LayerShape
    "sizes of the layer"
    cluster: Cluster
    "links between ranks"
    rates: KernelRates
    "speed of the kernels"
    seq_len: int
    "tokens of the pack, 1 to MAX_SEQ_LEN"
    cp_size: int
    "P, context-parallel ranks, 1 to MAX_CP_SIZE"
    layout: str = "contiguous"
    "one of layouts.LAYOUTS"
    cu_seqlens: Sequence[int] | None = None
    "[num_docs + 1] block-aligned document starts and seq_len; None: one document"
    schemes: list[Scheme] = field(default_factory=lambda: list(Scheme))
    "asked of an MSA layer"
    full_schemes: list[FullScheme] = field(default_factory=lambda: list(FullScheme))
    "asked of a full-attention layer"
    options: Options = field(default_factory=Options)
    "switches of the exchange"
    index_balance: bool = True
    "index queries move for equal scoring work"

    def __post_init__(self) -> None:
        if not 1 <= self.cp_size <= MAX_CP_SIZE:
            raise ValueError(f"cp_size={self.cp_size}: must be from 1 to {MAX_CP_SIZE}")
        if not 0 < self.seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len={self.seq_len}: must be from 1 to {MAX_SEQ_LEN}")
        head_size = self.options.head_size
        if head_size < 1 or self.shape.num_kv_heads % head_size or self.cp_size % head_size:
            raise ValueError(
                f"cp_head_size={head_size}: must divide num_kv_heads={self.shape.num_kv_heads} and "
                f"cp_size={self.cp_size}"
            )
        if head_size > 1 and self.cluster.node_uplink_bytes:
            raise ValueError(
                f"cp_head_size={head_size}: a shared uplink of {self.cluster.name} is not modelled for "
                "it; use 1"
            )
        self.cluster.num_nodes(self.cp_size)

    def placement(self, head_size: int | None = None) -> Placement:
        """Place the pack on its ranks, Ulysses groups as one; head_size: that of the options by default."""
        return place(
            self.layout,
            seq_len=self.seq_len,
            block_size=self.shape.block_size,
            cp_size=self.cp_size,
            cu_seqlens=self.cu_seqlens,
            head_size=head_size or self.options.head_size,
        )


def equal_documents(num_docs: int, seq_len: int, block_size: int) -> list[int]:
    """Return the starts of documents of about equal length, on block boundaries; the last entry is seq_len.

    Example: 3 documents in 8 blocks of 2 tokens -> [0, 4, 10, 16].

    Raises:
        ValueError: if there are more documents than blocks.
    """
    num_blocks = seq_len // block_size
    if not 1 <= num_docs <= num_blocks:
        raise ValueError(f"num_docs={num_docs}: must be from 1 to the number of blocks, {num_blocks}")
    return [i * num_blocks // num_docs * block_size for i in range(num_docs)] + [seq_len]
