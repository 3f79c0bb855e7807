"""Check where the groups of a run lie on its nodes: ranks are dealt to nodes in order, neighbours together.

Megatron numbers ranks tensor first, then context and expert parallel, then data, pipeline last. Tensor and
context parallel groups talk in every layer: inside a node that goes over NVLink, between nodes over the
network, which is several times slower.

Example: tp 2 and cp 4 on nodes of 8. A context parallel group is ranks 0, 2, 4, 6 of one node; the 8 ranks
0 to 7 that share a sequence fill it. With cp 8 they are 16 ranks on two nodes.
"""

import math

from msa_train.config import ParallelConfig


def check_placement(parallel: ParallelConfig, *, num_nodes: int, workers: int) -> list[str]:
    """Write a line for each kind of group that is cut by the end of a node, or spans several.

    Args:
        parallel: sizes of the groups.
        num_nodes: nodes of the job.
        workers: ranks of a node.

    Returns:
        Warnings; none of these placements is wrong, all of them are slower than they need be.

    Example: cp_size 4 on nodes of 6 ranks: the second group lies on ranks 4 to 7, on two nodes.
    Example: cp_size 16 on nodes of 8: ["parallel.tp_size * cp_size of 16 ranks spans 2 nodes"].
    """
    if num_nodes == 1:
        return []
    lines = []
    for name, size in _contiguous_groups(parallel).items():
        # groups whose size divides that of a node fill it and never cross its end
        if size == 1 or workers % size == 0:
            continue
        if size > workers and size % workers == 0:
            lines.append(f"{name} of {size} ranks spans {size // workers} nodes")
        else:
            # the largest part of such a group that always stays inside a node
            fitting = math.gcd(size, workers)
            lines.append(
                f"{name} of {size} ranks is cut by the end of a node of {workers}: some groups lie on more "
                f"nodes than they need; sizes that divide {workers}, or a multiple of it, do not ({fitting})"
            )
    return lines


def _contiguous_groups(parallel: ParallelConfig) -> dict[str, int]:
    """List the groups, or products of groups, whose ranks follow each other without a gap."""
    return {
        "parallel.tp_size": parallel.tp_size,
        "parallel.tp_size * cp_size": parallel.tp_size * parallel.cp_size,
        "parallel.ep_size": parallel.ep_size,
    }
