"""What computes full attention where, and how the libraries of GPUs are called: with stand-ins on the CPU."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from msa_kernels.full_attention import choice, cudnn, op, tiled, trial, varlen
from msa_kernels.full_attention.choice import Machine, choose_by_rule
from torch import Tensor

from tests.helpers.compare import assert_rows_close

BF16 = torch.bfloat16
M, G, D, SCALE = 2, 3, 16, 0.3


@pytest.mark.parametrize(
    ("machine", "taken"),
    [
        (Machine((9, 0), flash3=True, flash2=True, cudnn=True), "flash3"),
        (Machine((9, 0), flash2=True, cudnn=True), "cudnn"),
        (Machine((9, 0), flash2=True), "flash2"),
        (Machine((9, 0)), "torch"),
        (Machine((10, 0), flash3=True, flash2=True, cudnn=True), "cudnn"),
        (Machine((8, 0), flash3=True, flash2=True, cudnn=True), "flash2"),
        (Machine((8, 6), cudnn=True), "torch"),
        (Machine((7, 5), flash2=True, cudnn=True), "torch"),
        (Machine((0, 0)), "torch"),
    ],
    ids=str,
)
def test_auto(machine: Machine, taken: str) -> None:
    assert choose_by_rule("auto", machine, BF16, 128).name == taken


def test_what_a_library_cannot_do_is_passed_over_with_a_reason() -> None:
    all_of_them = Machine((9, 0), flash3=True, flash2=True, cudnn=True)
    assert choose_by_rule("auto", all_of_them, torch.float32, 128).name == "torch"
    assert choose_by_rule("auto", all_of_them, BF16, 20).name == "torch"
    without = choose_by_rule("auto", Machine((9, 0), flash2=True, cudnn=True), BF16, 256)
    assert without.name == "flash2"
    assert "cudnn: head_dim=256: must be at most 128" in without.reason
    repeats = choose_by_rule("auto", Machine((9, 0), cudnn=True), BF16, 128, deterministic=True)
    assert repeats.name == "torch"
    assert "cudnn: its gradients do not repeat bit by bit" in repeats.reason
    failed = choose_by_rule("auto", all_of_them, BF16, 128, failed={"flash3": "wrong"})
    assert (failed.name, failed.reason) == ("cudnn", "flash3: wrong")


@pytest.mark.parametrize(
    ("kernel", "machine", "dtype", "text"),
    [
        ("flash9", Machine((9, 0)), BF16, "full_kernel=flash9: must be one of"),
        ("flash2", Machine((9, 0)), BF16, "full_kernel=flash2: not installed; use full_kernel=auto"),
        ("flash3", Machine((8, 0), flash3=True), BF16, "full_kernel=flash3: runs on Hopper"),
        ("cudnn", Machine((9, 0), cudnn=True), torch.float32, "full_kernel=cudnn: dtype=float32"),
        ("cudnn", Machine((0, 0), cudnn=True), BF16, "full_kernel=cudnn: runs on GPUs"),
    ],
)
def test_what_cannot_run_is_refused(kernel: str, machine: Machine, dtype: torch.dtype, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        choose_by_rule(kernel, machine, dtype, 128)


def test_a_library_that_fails_the_trial_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_machine", lambda _: Machine((9, 0), flash3=True, cudnn=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trial, "try_out", lambda name, *_: "no such symbol" if name == "flash3" else None)
    found = choice.choose.__wrapped__("auto", torch.device("cpu"), BF16, 128, False)
    assert (found.name, found.reason) == ("cudnn", "flash3: no such symbol")


def checked(q: Tensor, k: Tensor, v: Tensor, *limits: Tensor) -> None:
    """What all these libraries want of their arguments."""
    for x in (q, k, v):
        assert x.dim() == 3
        assert x.dtype == BF16
        assert x.stride(-1) == 1
    assert q.shape[1] == M * G
    assert k.shape[1:] == v.shape[1:] == (M, D)
    for limit in limits:
        assert limit.dtype == torch.int32
        assert limit.is_contiguous()


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool
) -> Any:
    checked(q, k, v, cu_q, cu_k)
    grouped = q.unflatten(1, (M, G))
    out, lse = tiled.forward(grouped, k, v, cu_q.tolist(), cu_k.tolist(), causal, scale, "")
    return out.flatten(1, 2), lse.flatten(0, 1), None, None


def packed_backward(
    tensors: Sequence[Tensor], cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    dout, q, k, v, out, lse = tensors
    checked(q, k, v, cu_q, cu_k)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert lse.shape == q.shape[1::-1]
    grouped = [x.unflatten(1, (M, G)) for x in (dout, q, out)]
    dq, dk, dv = tiled.backward(
        grouped[0], grouped[1], k, v, grouped[2], lse, cu_q.tolist(), cu_k.tolist(), causal, scale, ""
    )
    return dq.flatten(1, 2), dk, dv


def flash2_module() -> ModuleType:
    """Stand in for flash_attn.flash_attn_interface with its signatures, as of flash-attn 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None, zero_tensors: bool = False,
    ) -> Any:  # fmt: skip
        assert max_seqlen_q >= 2
        assert (window_size_left, window_size_right, dropout_p, softcap) == (-1, -1, 0.0, 0.0)
        return packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Any:  # fmt: skip
        assert (window_size_left, window_size_right, dropout_p, softcap) == (-1, -1, 0.0, 0.0)
        grads = packed_backward(
            (dout, q, k, v, out, softmax_lse), cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
        )
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            assert place is not None
            assert place.is_contiguous()
            place.copy_(grad)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def flash3_module() -> ModuleType:
    """Stand in for flash_attn_interface of FlashAttention 3 with the arguments that it names."""
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
        qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        softmax_scale: float | None = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert softmax_scale is not None
        return packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
        softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
    ) -> Any:  # fmt: skip
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert softmax_scale is not None
        grads = packed_backward(
            (dout, q, k, v, out, softmax_lse), cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal
        )
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            assert place is not None
            place.copy_(grad)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout: float, causal: bool, mask: bool,
    *, scale: float,
) -> Any:  # fmt: skip
    assert bias is None
    assert with_lse
    assert not mask
    assert dropout == 0.0
    assert not causal or q.shape[2] == k.shape[2]
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    cu = [torch.tensor([0, x.shape[0]], dtype=torch.int32) for x in rows[:2]]
    out, lse, *_ = packed_forward(rows[0], rows[1], rows[2], cu[0], cu[1], scale, causal)
    return (out.transpose(0, 1)[None], lse[None, :, :, None], None, None, q.shape[2], k.shape[2], *[None] * 3)


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
    bias: None, cu_q: None, cu_k: None, max_q: int, max_k: int, dropout: float, causal: bool, *, scale: float,
) -> Any:  # fmt: skip
    assert lse.shape == (1, M * G, q.shape[2], 1)
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    rows = [x[0].transpose(0, 1) for x in (dout, q, k, v, out)]
    cu = [torch.tensor([0, x.shape[2]], dtype=torch.int32) for x in (q, k)]
    grads = packed_backward((*rows, lse[0, :, :, 0].contiguous()), cu[0], cu[1], scale, causal)
    return tuple(x.transpose(0, 1)[None] for x in grads)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = ModuleType("flash_attn")
    for module in (parent, flash2_module(), flash3_module()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    varlen._function.cache_clear()
    monkeypatch.setattr(cudnn, "_FORWARD", cudnn_forward)
    monkeypatch.setattr(cudnn, "_BACKWARD", cudnn_backward)
    monkeypatch.setattr(op, "_choose", lambda kernel, _: choice.Choice(kernel, "as configured"))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["flash2", "flash3", "cudnn"])
def test_adapters(kernel: str, causal: bool) -> None:
    """Shapes, dtypes and order of what a library gets and gives, for spans of keys in a joint tensor."""
    generator = torch.Generator().manual_seed(0)
    cu_q = [0, 5, 6, 20]
    cu_k = cu_q if causal and kernel == "cudnn" else [0, 9, 12, 40]
    q, dout = (torch.randn(20, M, G, D, generator=generator).bfloat16() for _ in range(2))
    # keys and values lie side by side, as they travel
    k, v = torch.randn(cu_k[-1], 2, M, D, generator=generator).bfloat16().unbind(1)
    out, lse = op.attention_forward(q, k, v, cu_q, cu_k, causal=causal, softmax_scale=SCALE, kernel=kernel)
    want, want_lse = tiled.forward(q, k, v, cu_q, cu_k, causal, SCALE, "")
    assert out.is_contiguous()
    assert_rows_close(out, want, 1e-6)
    assert_rows_close(lse, want_lse, 1e-6)
    grads = op.attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, causal=causal, softmax_scale=SCALE, kernel=kernel
    )
    flat = want_lse.flatten(0, 1)
    for got, ref in zip(
        grads, tiled.backward(dout, q, k, v, want, flat, cu_q, cu_k, causal, SCALE, ""), strict=True
    ):
        assert_rows_close(got, ref, 1e-6)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("kernel", ["flash2", "flash3"])
def test_trial_finds_a_wrong_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "G", 2)
    assert trial.try_out(kernel, torch.device("cpu"), BF16, D) is None
    right = varlen._FORWARD[kernel]
    monkeypatch.setitem(varlen._FORWARD, kernel, lambda *x: right(*x[:4], not x[4], x[5]))
    said = trial.try_out(kernel, torch.device("cpu"), BF16, D)
    assert said is not None
    assert said.startswith("wrong on a small problem")
    monkeypatch.setitem(varlen._FORWARD, kernel, lambda *_: 1 / 0)
    assert "ZeroDivisionError" in str(trial.try_out(kernel, torch.device("cpu"), BF16, D))


def test_torch_operators_have_the_arguments_that_are_given() -> None:
    """Schemas are in every build of torch: a release that changes one shows without a GPU."""
    aten = torch.ops.aten
    names: dict[Any, Sequence[str]] = {
        aten._flash_attention_forward.default: (
            "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
            "return_debug_mask", "scale",
        ),
        aten._flash_attention_backward.default: (
            "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k",
            "max_q", "max_k", "dropout_p", "is_causal",
        ),
        aten._scaled_dot_product_cudnn_attention.default: tuple(
            ["attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask", "scale"]
        ),
        aten._scaled_dot_product_cudnn_attention_backward.default: (
            "grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset",
            "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale",
        ),
    }  # fmt: skip
    for operator, wanted in names.items():
        found = [argument.name for argument in operator._schema.arguments]
        start = found.index(wanted[0])
        assert found[start : start + len(wanted)] == list(wanted), operator


def test_fake_tensors_give_shapes_and_what_kernels_hold() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(64, 2, 4, 128, dtype=BF16, device="cuda")
        k = torch.empty(96, 2, 128, dtype=BF16, device="cuda")
        out, lse = torch.ops.msa.full_attention_forward(q, k, k, [0, 64], [0, 96], False, 1.0, "flash2")
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 64), torch.float32)
        grads = torch.ops.msa.full_attention_backward(
            q, q, k, k, out, lse, [0, 64], [0, 96], False, 1.0, "flash2"
        )
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
        per_head = 96 * 8 * 128 * 2
        rows = (64 + 128) * 8
        assert op.backward_scratch(q, k, 1, "flash2") == [rows * 128 * 4, rows * 4, per_head, per_head]


def test_a_piece_of_keys_is_bounded_in_bytes() -> None:
    q = torch.empty(1, 4, 16, 128, dtype=BF16, device="meta")
    assert op.most_keys(q) == 16384
