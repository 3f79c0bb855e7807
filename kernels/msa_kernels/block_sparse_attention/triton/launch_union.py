"""Launch the forward kernel that takes queries first, where they have blocks in common. Imports Triton."""

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.triton.forward_kernel import LOG2E
from msa_kernels.block_sparse_attention.triton.portions import Portion
from msa_kernels.block_sparse_attention.triton.union import Union, build_union
from msa_kernels.block_sparse_attention.triton.union_kernel import attend_union_kernel
from msa_kernels.block_sparse_attention.types import PoolOutput
from msa_kernels.operators import Launched
from msa_kernels.tiles import padded

# of rows that the copy engine reads
_BYTES_PER_ROW = 16


@dataclass(slots=True)
class UnionWork:
    """Hold the tiles of one portion, and whether they are what is computed."""

    union: Union
    """Blocks of each tile."""
    chosen: Tensor
    """[1] int32 on the device, 1: this kernel forms the result, 0: the block-first kernels do."""
    num_queries: int
    """Queries of a tile."""
    keys: int
    """Keys of a step."""
    config: configs.TileConfig
    """Tile sizes."""


def find_union(portion: Portion) -> UnionWork | None:
    """Collect what neighbours read in common; None where no tiles serve these sizes.

    The choice falls on the device, by the mean size of the unions: nobody waits, and the kernels of the other
    kind end at once. So the same selection is computed the same way on every run.
    """
    sizes = portion.sizes
    config = configs.pick(configs.UNION, padded(sizes.D), padded(sizes.B), sizes.element_bytes)
    keys, group = min(configs.UNION_KEYS, sizes.B), triton.next_power_of_2(sizes.G)
    whole_rows = sizes.D * sizes.element_bytes % _BYTES_PER_ROW == 0
    if config is None or configs.UNION_SHARE <= 0 or not whole_rows:
        return None
    # a product needs 16 keys and 16 rows
    num_queries = min(configs.UNION_QUERIES, config.rows // group)
    if sizes.B % keys or keys & (keys - 1) or keys < 16 or num_queries * group < 16:
        return None
    union = build_union(
        portion.block_table, portion.pool.block, sizes.B, num_queries, used=portion.schedule.used
    )
    return UnionWork(union, union.small(configs.UNION_SHARE * sizes.K), num_queries, keys, config)


def attend_union(portion: Portion, work: UnionWork, result: PoolOutput, chunk: slice, *, merge: bool) -> None:
    """Fill in outputs and log-sum-exps of the rows of `chunk`, or merge with them; not the index branch's."""
    sizes, queries, union = portion.sizes, portion.queries, work.union
    kv = portion.pool.kv.view(-1, sizes.D)
    lse = result.lse[chunk]
    Launched(attend_union_kernel)[(union.size.numel(),)](
        queries.q,
        TensorDescriptor.from_tensor(kv, [work.keys, padded(sizes.D)]),
        *portion.visibility,
        work.chosen,
        union.block,
        union.token,
        union.readers,
        union.size,
        result.out[chunk],
        lse,
        lse if result.lse_teacher is None else result.lse_teacher[chunk],
        queries.q.shape[0],
        sizes.M,
        queries.softmax_scale * LOG2E.value,
        1.0 / queries.temperature,
        L=union.block.shape[-1],
        B=sizes.B,
        **sizes.shape,
        ROWS=work.num_queries * triton.next_power_of_2(sizes.G),
        KEYS=work.keys,
        WINDOWED=queries.window is not None,
        SOFTENED=result.lse_teacher is not None,
        MERGE=merge,
        STAGES=work.config.num_stages,
        num_warps=work.config.num_warps,
    )
