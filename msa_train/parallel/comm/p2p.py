"""Send messages between two ranks each, and rows from all to all, on a CPU by such messages.

gloo's own all-to-all posts what a rank sends before what it receives. A sender may only start when its
receiver has told it so, over the one connection that both directions share: behind data that already left,
that word waits until these are through, and what could flow both ways at once flows one way after the other.
Receives first, an all-to-all of 4 ranks takes .6 to .8 of the time (links of 200 and of 1000 Mbit/s).
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

# Rank within the group, and what goes there or comes from there.
Message = tuple[int, Tensor]


def start_sends_and_receives(
    group: dist.ProcessGroup, arriving: Sequence[Message], leaving: Sequence[Message]
) -> list[dist.Work]:
    """Begin to receive and to send contiguous tensors; between two ranks they keep their order.

    Receives are posted first, see above.
    """
    ranks = dist.get_process_group_ranks(group)
    operations = [dist.P2POp(dist.irecv, x, ranks[rank], group) for rank, x in arriving]
    operations += [dist.P2POp(dist.isend, x, ranks[rank], group) for rank, x in leaving]
    return dist.batch_isend_irecv(operations) if operations else []


def start_all_to_all_rows(
    group: dist.ProcessGroup, out: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int]
) -> list[dist.Work]:
    """Begin an all-to-all of rows; on a CPU nothing travels where there are none.

    Args:
        group: whose ranks trade.
        out: [sum(receive), ...] contiguous, `receive[r]` rows from each rank r in order.
        x: [sum(send), ...] contiguous, `send[r]` rows to each rank r in order.
        receive: as every rank's `send` says.
        send: see x.
    """
    sizes = list(receive), list(send)
    if x.device.type != "cpu":
        work = dist.all_to_all_single(out, x, *sizes, group=group, async_op=True)
        return [work] if work is not None else []
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    arriving, leaving = out.split(sizes[0]), x.split(sizes[1])
    arriving[rank].copy_(leaving[rank])
    # Every rank sends to its next rank first: at no time do all send to the same one.
    after = [(rank + step) % size for step in range(1, size)]
    return start_sends_and_receives(
        group,
        [(other, arriving[other]) for other in reversed(after) if receive[other]],
        [(other, leaving[other]) for other in after if send[other]],
    )
