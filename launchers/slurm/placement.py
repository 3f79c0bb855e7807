"""Where the groups of a run lie on its nodes: ranks are dealt to nodes in order, neighbours stay together.

Megatron numbers ranks tensor first, then context and expert parallel, then data, pipeline last.
"""

import math

from msa_train.config import ParallelConfig


def check_placement(parallel: ParallelConfig, *, num_nodes: int, workers: int) -> list[str]:
    """One line for each kind of group that fits into a node but is cut by the end of one, or spans several.

    Args:
        parallel: sizes of the groups.
        num_nodes: nodes of the job.
        workers: ranks of a node.

    Example: cp_size 4 on nodes of 6 ranks: the second group lies on ranks 4 to 7, on two nodes.
    """
    if num_nodes == 1:
        return []
    lines = []
    for name, size in _contiguous_groups(parallel).items():
        if size == 1 or workers % size == 0:
            continue
        if size > workers and size % workers == 0:
            lines.append(f"{name} of {size} ranks spans {size // workers} nodes")
        else:
            fitting = math.gcd(size, workers)
            lines.append(
                f"{name} of {size} ranks is cut by the end of a node of {workers}: some groups lie on more "
                f"nodes than they need; sizes that divide {workers}, or a multiple of it, do not ({fitting})"
            )
    return lines


def _contiguous_groups(parallel: ParallelConfig) -> dict[str, int]:
    return {
        "parallel.tp_size": parallel.tp_size,
        "parallel.tp_size * cp_size": parallel.tp_size * parallel.cp_size,
        "parallel.ep_size": parallel.ep_size,
    }
