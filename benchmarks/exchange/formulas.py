"""Compute the bytes that a rank receives per layer, forward and backward, in closed form.

Symbols: S tokens of the pack, P ranks, T = S / P, M KV groups, D head dim, Di index head dim, B block size,
e bytes per element, U remote (block, group) pairs that this rank fetches, V pairs that others fetch from it.

| | index keys | K/V forward | K/V again | gradients |
|---|---|---|---|---|
| all_gather | Di e T (P-1) | 2 M D e T (P-1) | the same | (2 M D + M Di) e T (P-1), a reduce-scatter |
| all_gather_all_reduce | same | same | 0, they are kept | twice that, an all-reduce |
| ring | same | same | same | (2 M D + M Di) e T P: sums also travel home |
| selected | same | 2 B D e U | 0, they are kept | (2 B D + B Di) e V |

`selected` also gathers its requests, a bit per pair of the pack and 64 bytes from each rank. demand.py has
what changes where hot pairs are broadcast and nodes are known. The gradients of index keys (the terms with
M Di and B Di) travel with the KL loss alone.
"""

from dataclasses import dataclass

_REQUEST_HEADER_BYTES = 64


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerShape:
    """Describe one MSA layer over a pack."""

    seq_len: int = 4096
    "tokens of the pack, over all ranks"
    block_size: int = 32
    "tokens of a KV block"
    topk: int = 4
    "blocks that a query selects per KV head"
    num_kv_heads: int = 4
    "M"
    heads_per_group: int = 1
    "query heads that share a KV head"
    head_dim: int = 128
    "D"
    index_head_dim: int = 128
    "Di"
    bytes_per_element: int = 4
    "of what travels"
    with_kl: bool = True
    "the index branch is trained, so gradients of index keys travel"

    @property
    def kv_token_bytes(self) -> int:
        """Count the bytes of a token's keys and values, all groups."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_element

    @property
    def index_token_bytes(self) -> int:
        """Count the bytes of a token's index key."""
        return self.index_head_dim * self.bytes_per_element

    @property
    def grad_token_bytes(self) -> int:
        """Count the bytes of a token's gradients: of keys and values, and of its index key once per group."""
        return self.kv_token_bytes + self.with_kl * self.num_kv_heads * self.index_token_bytes

    def kv_block_bytes(self, token_bytes: int) -> int:
        """Count the bytes of a KV block, from those of a token over all KV heads."""
        return token_bytes * self.block_size // self.num_kv_heads


def index_key_bytes(shape: LayerShape, cp_size: int) -> int:
    """Count the bytes of the gather of index keys, the same in every scheme."""
    return shape.index_token_bytes * (shape.seq_len // cp_size) * (cp_size - 1)


def request_bytes(shape: LayerShape, cp_size: int) -> int:
    """Count the bytes of the gather of requests: a bitmap of every owner's pairs and a header from each rank.

    Example: 4096 tokens, blocks of 32, 4 KV heads, 4 ranks -> 128 pairs of each owner, 4 bitmaps of 16 bytes
    and 64 bytes from each of 3 others: 3 * (64 + 64) = 384.
    """
    pairs = shape.seq_len // cp_size // shape.block_size * shape.num_kv_heads
    return (cp_size - 1) * (cp_size * -(-pairs // 8) + _REQUEST_HEADER_BYTES)


def all_gather_bytes(shape: LayerShape, cp_size: int) -> dict[str, int]:
    """Count the bytes of all_gather: gather, gather again, reduce-scatter."""
    remote = shape.seq_len // cp_size * (cp_size - 1)
    return {
        "index_key": index_key_bytes(shape, cp_size),
        "kv": shape.kv_token_bytes * remote,
        "kv_again": shape.kv_token_bytes * remote,
        "kv_grad": shape.grad_token_bytes * remote,
    }


def all_reduce_bytes(shape: LayerShape, cp_size: int) -> dict[str, int]:
    """Count the bytes of all_gather_all_reduce: gather once, all-reduce the gradient of everything."""
    gathered = all_gather_bytes(shape, cp_size)
    return gathered | {"kv_again": 0, "kv_grad": 2 * gathered["kv_grad"]}


def ring_bytes(shape: LayerShape, cp_size: int) -> dict[str, int]:
    """Count the bytes of ring: shards pass by in both passes, sums of gradients make one step more."""
    return all_gather_bytes(shape, cp_size) | {"kv_grad": shape.grad_token_bytes * shape.seq_len}


def selected_bytes(shape: LayerShape, cp_size: int, *, fetched: int, served: int) -> dict[str, int]:
    """Count the bytes of selected: only the pairs that are needed, one by one.

    Args:
        shape, cp_size: see the head of the file.
        fetched: remote pairs that this rank's queries selected.
        served: pairs that it sends to others, whose gradients it gets back.
    """
    return {
        "index_key": index_key_bytes(shape, cp_size),
        "request": request_bytes(shape, cp_size),
        "kv": shape.kv_block_bytes(shape.kv_token_bytes) * fetched,
        "kv_grad": shape.kv_block_bytes(shape.grad_token_bytes) * served,
    }
