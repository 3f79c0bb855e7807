"""Which (block, group) pairs a rank needs from whom: from the selection to send and receive lists.

Shapes: T local queries, M KV groups, NB blocks of the pack, NL = NB / P blocks per rank, P ranks.
A rank's own pairs are numbered group * NL + local block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.parallel.collectives import CpComm
from msa_train.parallel.layout import ShardLayout


def needed_pairs(block_indices: Tensor, num_blocks: int) -> Tensor:
    """[T, M, topk] block ids, -1 for none -> [M, NB] bool: does any query of the group select the block?"""
    num_groups = block_indices.shape[1]
    # Column 0 takes the -1 entries and is cut off.
    needed = torch.zeros(num_groups, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.permute(1, 0, 2).reshape(num_groups, -1).long() + 1
    return needed.scatter_(1, ids, True)[:, 1:]


@dataclass(slots=True)
class BlockRequests:
    """The agreed exchange of one layer, kept for the backward pass and for recomputation.

    send_pairs: [sum(send)] own pairs to send, by requesting rank, then ascending.
    receive_group, receive_block: [sum(receive)] group and global block of what arrives, by owner, in the
        same order as the owner sends.
    send, receive: pairs to and from each rank.
    """

    send_pairs: Tensor
    receive_group: Tensor
    receive_block: Tensor
    send: list[int]
    receive: list[int]


def exchange_requests(needed: Tensor, layout: ShardLayout, comm: CpComm) -> BlockRequests:
    """Tell every owner which of its pairs this rank needs, and learn what the others need.

    One all-to-all of fixed size (a byte per own pair and peer), one host copy of P counts each way.

    Args:
        needed: [M, NB] bool, this rank's needs; own blocks are ignored.
        layout: this rank's shard.
        comm: collectives of the context-parallel group.
    """
    local = layout.num_local_blocks
    wanted = layout.blocks_by_owner(needed).clone()
    wanted[layout.cp_rank] = False
    rows = [1] * layout.cp_size
    asked = comm.all_to_all(wanted.to(torch.uint8), rows, rows, "request").bool()
    asked[layout.cp_rank] = False
    send = asked.flatten(1).nonzero()
    receive = wanted.flatten(1).nonzero()
    counts = torch.stack((asked.flatten(1).sum(1), wanted.flatten(1).sum(1))).tolist()
    owner, pair = receive.unbind(1)
    return BlockRequests(
        send_pairs=send[:, 1],
        receive_group=pair // local,
        receive_block=layout.blocks(needed.device)[owner, pair % local],
        send=counts[0],
        receive=counts[1],
    )
