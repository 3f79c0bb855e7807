"""The operators on the device, at MiniMax-M3's tiles on a GPU: exact enough, and the same bits twice.

On the pretended GPU the same in torch and small: what is seen there is that nothing leaves the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from msa_kernels import DecodeCache, decode_attention, quantize_index_keys, select_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from benchmarks.gpu.check import GROUPS, Check, check_cases, run_checks
from benchmarks.gpu.problem import M3, SMOKE, GroupProblem, Tensors, make_groups, make_index, select
from tests.helpers.device_jobs import HAS_GPU, KERNEL, Job, needs_device, needs_triton_gpu
from tests.helpers.same_bits import differing

pytestmark = pytest.mark.gpu
SIZES, DTYPE = (M3, torch.bfloat16) if HAS_GPU else (SMOKE, torch.float16)
SEQ_LEN, CHECKED_QUERIES, DENSE_QUERIES, FP32_LEN = (4096, 512, 512, 4096) if HAS_GPU else (128, 16, 32, 2048)
# Of a score in fp32, relative to the largest; factors rounded to TF32 make it a hundred times that.
FP32_ROUNDING = 4e-6
INDEX_DIMS = (16, 32, 128)


def fresh_tensors(dtype: torch.dtype = DTYPE) -> Tensors:
    """Of the device of this rank."""
    return Tensors(torch.device("cuda", torch.cuda.current_device()), dtype, seed=5)


def selection_bits(rank: int, world_size: int) -> list[int]:
    """Block ids, and the log-sum-exp of the kernel that gives both."""
    index = make_index(fresh_tensors(), SIZES, SEQ_LEN)

    def with_lse() -> tuple[Tensor, Tensor]:
        return select_blocks(
            index.q, index.k, torch.tensor([0, SEQ_LEN]),
            block_size=SIZES.block_size, topk=SIZES.topk, kernel=KERNEL, return_lse=True,
        )  # fmt: skip

    return differing(lambda: (select(index, SIZES, KERNEL), *with_lse()))


def sparse_problem() -> GroupProblem:
    """Every query of one document; many for each block, so that the lists of a block's queries are split."""
    tensors = fresh_tensors()
    index = make_index(tensors, SIZES, SEQ_LEN)
    return make_groups(tensors, SIZES, index, select(index, SIZES, "cpu"), with_kl=True)


def forward_bits(rank: int, world_size: int) -> list[int]:
    """Output and both log-sum-exps."""
    problem = sparse_problem()

    def call() -> Sequence[Tensor]:
        part = pool_forward(problem.queries, problem.pool, problem.block_table, kernel=KERNEL)
        assert part.lse_index is not None, "made with an index branch"
        return part.out, part.lse, part.lse_index

    return differing(call)


def backward_bits(rank: int, world_size: int) -> list[int]:
    """All gradients, those of the KL loss too, and its value."""
    problem = sparse_problem()
    # the forward's kernels are another rank's matter
    part = pool_forward(problem.queries, problem.pool, problem.block_table, kernel="cpu")
    assert part.lse_index is not None, "made with an index branch"
    term = KlTerm(part.lse_index, weight=1.0)
    dout = problem.dout.float()
    delta = (dout * part.out).sum(-1)

    def call() -> Sequence[Tensor]:
        grads = pool_backward(
            problem.queries, problem.pool, problem.block_table, dout, delta, part.lse, term, kernel=KERNEL
        )
        assert grads.dq_index is not None, "called with a KL term"
        assert grads.dk_index is not None, "called with a KL term"
        assert grads.kl is not None, "called with a KL term"
        return grads.dq, grads.dkv, grads.dq_index, grads.dk_index, grads.kl

    return differing(call)


def dense_bits(rank: int, world_size: int) -> list[int]:
    """Log-sum-exps, gradients and value of the warm-up's loss."""
    normal, M, T = fresh_tensors().normal, SIZES.num_kv_heads, DENSE_QUERIES
    q, k = normal(M, SIZES.heads_per_group, T, SIZES.head_dim), normal(M, T, SIZES.head_dim)
    q_index, k_index = normal(M, T, SIZES.index_head_dim), normal(T, SIZES.index_head_dim)
    scale, index_scale = SIZES.head_dim**-0.5, SIZES.index_head_dim**-0.5

    def call() -> Sequence[Tensor]:
        lse = lse_part(q, k, causal=True, softmax_scale=scale, kernel=KERNEL)
        lse_index = lse_part(
            q_index[:, None], k_index[None], causal=True, softmax_scale=index_scale, kernel=KERNEL
        )[:, 0]
        grads = dense_kl_part(
            q, k, lse, q_index, k_index, lse_index,
            causal=True, softmax_scale=scale, index_scale=index_scale, kernel=KERNEL,
        )  # fmt: skip
        return lse, lse_index, grads.dq_index, grads.dk_index, grads.kl

    return differing(call)


class Decoding:
    """Two sequences and their new tokens, which `change` replaces in place."""

    def __init__(self, fp8: bool) -> None:
        self.tensors = fresh_tensors()
        normal, M = self.tensors.normal, SIZES.num_kv_heads
        k, v = (normal(2, SEQ_LEN, M, SIZES.head_dim) for _ in range(2))
        keys = normal(2, SEQ_LEN, SIZES.index_head_dim)
        coded = quantize_index_keys(keys) if fp8 else (keys, None)
        self.cache = DecodeCache(k, v, coded[0], k_index_scale=coded[1])
        self.q, self.q_index = normal(2, SIZES.num_heads, SIZES.head_dim), normal(2, M, SIZES.index_head_dim)
        self.lens = torch.tensor([SEQ_LEN, SEQ_LEN // 2 - 3], dtype=torch.int32).to(k.device)

    def __call__(self) -> Sequence[Tensor]:
        return decode_attention(
            self.q, self.q_index, self.cache, self.lens,
            block_size=SIZES.block_size, topk=SIZES.topk, kernel=KERNEL,
        )  # fmt: skip

    def change(self) -> None:
        """Another token: everything that a captured call reads."""
        for tensor in (self.q, self.q_index, self.cache.k, self.cache.v):
            tensor.copy_(self.tensors.normal(*tensor.shape))
        self.cache.k_index.copy_(self.cache.k_index.flip(1))
        if self.cache.k_index_scale is not None:
            self.cache.k_index_scale.copy_(self.cache.k_index_scale.flip(1))
        self.lens.copy_(torch.tensor([SEQ_LEN // 3, SEQ_LEN - 1], dtype=torch.int32))


def decode_bits(rank: int, world_size: int) -> list[int]:
    """Outputs, log-sum-exps and blocks, with index keys as they are and in fp8."""
    return [place for fp8 in (False, True) for place in differing(Decoding(fp8))]


def replayed_bits(rank: int, world_size: int) -> dict[bool, list[int]]:
    """What a captured call gives after its inputs were changed, where it is not what another call gives."""
    found: dict[bool, list[int]] = {}
    for fp8 in (False, True):
        call = Decoding(fp8)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        # kernels are compiled and loaded by a first call, which cannot be captured
        with torch.cuda.stream(beside):
            before = [tensor.clone() for tensor in call()]
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        call.change()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert not any(torch.equal(*pair) for pair in zip(replayed, before, strict=True)), "nothing changed"
        found[fp8] = [
            n for n, pair in enumerate(zip(replayed, call(), strict=True)) if not torch.equal(*pair)
        ]
    return found


def fp32_gaps(rank: int, world_size: int) -> dict[tuple[int, bool], float]:
    """How far below the best block left out, of all that may be chosen, a chosen one lies, by index dim.

    Relative to the largest score, in fp64; True: of the kernel that also gives the log-sum-exp.
    """
    tensors = fresh_tensors(torch.float32)
    S, B, topk = FP32_LEN, SIZES.block_size, SIZES.topk
    found = {}
    for dim in INDEX_DIMS:
        q, k = tensors.normal(S, 2, dim), tensors.normal(S, dim)
        scores = torch.einsum("tmd,sd->tms", q.double(), k.double()).unflatten(-1, (-1, B)).amax(-1)
        own = torch.arange(S, device=q.device) // B
        block = torch.arange(S // B, device=q.device)
        before = (block < own[:, None])[:, None].expand_as(scores)
        for with_lse in (False, True):
            result: Any = select_blocks(
                q, k, torch.tensor([0, S]), block_size=B, topk=topk, kernel=KERNEL, return_lse=with_lse
            )
            ids = (result[0] if with_lse else result).long()
            chosen = torch.zeros(S, 2, S // B + 1, dtype=torch.bool, device=q.device)
            chosen = chosen.scatter_(2, torch.where(ids >= 0, ids, S // B), True)[..., :-1]
            assert torch.equal(chosen.sum(-1), (own + 1).clamp(max=topk)[:, None].expand(-1, 2))
            assert bool((chosen & ~before).sum(-1).eq(1).all()), "the own block, and none after it"
            lowest = scores.masked_fill(~(chosen & before), float("inf")).amin(-1)
            left_out = scores.masked_fill(chosen | ~before, float("-inf")).amax(-1)
            found[dim, with_lse] = float((left_out - lowest).max() / scores.abs().max())
    return found


SAME_BITS: dict[str, Job] = {
    fn.__name__: Job(fn) for fn in (selection_bits, forward_bits, backward_bits, dense_bits, decode_bits)
}
FP32 = Job(fp32_gaps)
REPLAYED = Job(replayed_bits) if HAS_GPU else None


def checks(rank: int = 0, world_size: int = 1) -> list[Check]:
    """All that a benchmark looks at before it times anything."""
    return run_checks(fresh_tensors(), SIZES, KERNEL, seq_len=SEQ_LEN, num_queries=CHECKED_QUERIES)


@needs_device
@pytest.mark.parametrize("name", SAME_BITS)
def test_same_bits_twice(name: str) -> None:
    assert SAME_BITS[name].result() == []


@needs_device
def test_selection_in_fp32_is_exact() -> None:
    """Where scores differ by more than fp32 rounds; tensor cores would round the factors to TF32."""
    found = FP32.result()
    assert found.keys() == {(dim, with_lse) for dim in INDEX_DIMS for with_lse in (False, True)}
    assert max(found.values()) <= FP32_ROUNDING, found


@needs_triton_gpu
def test_replays_of_a_graph_equal_calls() -> None:
    """Decoding captured once, with other queries, keys and lengths in the same memory since."""
    assert REPLAYED is not None
    assert REPLAYED.result() == {False: [], True: []}


@needs_device
def test_at_most_twice_the_error_of_torch() -> None:
    """Worst rows against fp64; on a GPU in bf16, by kernels which the other tests have compiled by now."""
    call: Callable[[], list[Check]] = checks
    if HAS_GPU:
        for job in SAME_BITS.values():
            job.wait()
    else:
        call = Job(checks).result
    found = call()
    made = {check.name.partition(":")[0] for check in found}
    names = (
        check_cases(group, Tensors(torch.device("cpu"), DTYPE, 1), SIZES, KERNEL, seq_len=1, num_queries=1)
        for group in GROUPS
    )
    assert made == set().union(*names)
    assert [check for check in found if not check.passed] == []
