"""Fused norms, rotary embedding, gates, router and softmax: the plain ones' numbers, whatever the rows."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from msa_train.config import Activation, Fusion, ModelConfig, Rope, RunConfig, TrainConfig
from msa_train.model.layers import fusion
from msa_train.model.layers.fused_gate import fused_gate
from msa_train.model.layers.fused_norm import rms_norm
from msa_train.model.layers.fused_router import best_experts, fused_probs
from msa_train.model.layers.norm import RMSNorm, norm_and_rotate
from msa_train.model.layers.rotary import rotary_table
from msa_train.model.transformer_config import build_transformer_config, fuses
from tests.helpers.compare import assert_rows_close, worst_row

# of fp64 and fp32 rounding; bf16: one rounding less or more between norm and rotation
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_compiled", lambda function: function)


def norm_of(width: int, dtype: torch.dtype, *, zero_centered: bool, is_fused: bool) -> RMSNorm:
    norm = RMSNorm(
        SimpleNamespace(  # type: ignore[arg-type]
            layernorm_zero_centered_gamma=zero_centered,
            params_dtype=dtype,
            sequence_parallel=False,
            is_fused=is_fused,
        ),
        width,
    )
    norm.weight.data.normal_(0.5, 0.2, generator=torch.Generator().manual_seed(1))
    return norm


def run(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(300, 1, 128), (257, 4, 32), (64, 24), (1, 8)])
def test_plain_norm_has_the_bits_of_torchs_own(
    shape: tuple[int, ...], dtype: torch.dtype, zero_centered: bool
) -> None:
    """Output and gradients; for the backward pass it keeps its input and one number a row."""
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    norm = norm_of(shape[-1], dtype, zero_centered=zero_centered, is_fused=False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def of_torch(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(wide) + 1 if zero_centered else weight.to(wide)
        return F.rms_norm(x.to(wide), (shape[-1],), weight, norm.eps).to(dtype)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, norm.eps, zero_centered=zero_centered)

    for a, b in zip(run(of_torch, grad, x, norm.weight), run(ours, grad, x, norm.weight), strict=True):
        assert torch.equal(a, b)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x.requires_grad_())
    rows = x.numel() // shape[-1]
    assert sum(kept) == (x.numel() + shape[-1]) * dtype.itemsize + rows * wide.itemsize


def check_norms(dtype: torch.dtype, rows: int) -> None:
    """A layer's norm, a norm for each head, one over all heads, and rotation alone."""
    generator = torch.Generator().manual_seed(rows)
    table = rotary_table(
        torch.arange(rows) * 7919,
        rotary_dim=8,
        rope=Rope(theta=1e4),
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    mixed = torch.randn(rows, 2, 5, 16, generator=generator).to(dtype)
    # a view, as queries are of the fused projection
    heads, grad = mixed[:, :, :3], torch.randn(rows, 2, 3, 16, generator=generator).to(dtype)
    for width, zero_centered in ((16, True), (16, False), (96, True), (0, True)):
        results = []
        for is_fused in (False, True):
            norm = norm_of(width, dtype, zero_centered=zero_centered, is_fused=is_fused) if width else None

            def rotated(x: Tensor, norm: RMSNorm | None = norm, is_fused: bool = is_fused) -> Tensor:
                return norm_and_rotate(norm, x, table, is_fused=is_fused)

            found = run(rotated, grad, heads)
            if norm is not None:
                found += torch.autograd.grad(rotated(heads), norm.weight, grad)
                found += run(norm, grad.flatten(1)[:, :width], heads.flatten(1)[:, :width])
            results.append(found)
        for got, want in zip(results[1], results[0], strict=True):
            assert got.dtype == want.dtype
            assert_rows_close(got, want, TOLERANCES[dtype])


def plain_gate(hidden: Tensor, scale: Tensor | None, is_oai: bool) -> Tensor:
    """As Megatron's MLP has it."""
    config = build_transformer_config(
        RunConfig(model=ModelConfig(activation=Activation.swiglu_oai if is_oai else Activation.swiglu))
    )
    gate, up = hidden.chunk(2, dim=-1)
    if config.activation_func_clamp_value is not None:
        limit = config.activation_func_clamp_value
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    inner = config.activation_func(gate) * (up + config.glu_linear_offset)
    return inner if scale is None else (inner * scale.unsqueeze(-1)).to(hidden.dtype)


def check_gates(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    # some beyond the limits
    hidden = (torch.randn(rows, 24, generator=generator) * 5).to(dtype)
    grad = torch.randn(rows, 12, generator=generator).to(dtype)
    scale = torch.rand(rows, generator=generator).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    for is_oai in (False, True):
        for inputs in ((hidden,), (hidden, scale)):

            def call(function: Any, *given: Tensor, is_oai: bool = is_oai) -> Tensor:
                return function(given[0], given[1] if len(given) > 1 else None, is_oai=is_oai)

            got = run(lambda *x: call(fused_gate, *x), grad, *inputs)
            want = run(lambda *x: call(plain_gate, *x), grad, *inputs)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype
                if a.numel():
                    assert_rows_close(a, b, TOLERANCES[dtype])


def check_router(rows: int) -> None:
    """Megatron's experts; probabilities and gradients as near to those of fp64 as Megatron's are."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 16, generator=generator) * 3
    # ties, scores that round to 0 and to 1
    logits[: rows // 4, 3:7] = 1.0
    logits[: rows // 5] -= 200
    logits[: rows // 6] += 250
    bias = torch.linspace(-0.2, 0.2, 16)
    for topk in (1, 4):
        grad = torch.randn(rows, topk, generator=generator)
        chosen = best_experts(logits, bias, topk)

        def plain(x: Tensor, topk: int = topk, chosen: Tensor = chosen) -> Tensor:
            probs, selected = topk_routing_with_score_function(
                x, topk, scaling_factor=2.5, score_function="sigmoid", expert_bias=bias
            )
            assert torch.equal(selected, torch.zeros_like(x).scatter(1, chosen, 1).bool())
            return probs.gather(1, chosen)

        def compiled(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            return fused_probs(x, chosen, 2.5)

        def exact(x: Tensor, topk: int = topk, chosen: Tensor = chosen) -> Tensor:
            scores = torch.sigmoid(x).gather(1, chosen)
            return scores / (scores.sum(1, keepdim=True) + 1e-20 if topk > 1 else 1) * 2.5

        want = run(exact, grad.double(), logits.double())
        for got, megatron, value in zip(
            run(compiled, grad, logits), run(plain, grad, logits), want, strict=True
        ):
            assert got.dtype == torch.float32
            assert_rows_close(got, value, max(2 * worst_row(megatron, value), TOLERANCES[torch.float32]))


@pytest.mark.usefixtures("_uncompiled")
def test_router() -> None:
    for rows in (1, 2, 33):
        check_router(rows)
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    chosen = best_experts(logits, None, 3)
    assert torch.autograd.gradcheck(lambda x: fused_probs(x, chosen, 2.0), logits)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_formulas(dtype: torch.dtype) -> None:
    for rows in (1, 2, 33):
        check_norms(dtype, rows)
        check_gates(dtype, rows)
    check_gates(dtype, 0)


@pytest.mark.usefixtures("_uncompiled")
def test_kept_for_the_backward_pass() -> None:
    """The input in its own dtype and a number a row; no copies in fp32."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    norm = norm_of(64, torch.bfloat16, zero_centered=True, is_fused=True)
    x = torch.randn(10, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        norm(x)
    assert sorted(sizes) == [10 * 4, 64 * 2, 10 * 64 * 2]


def check_compiled() -> None:
    """One version for all numbers of rows, each way; in a process of its own."""
    import torch._inductor.config as settings
    from torch._dynamo.utils import counters

    # compiling the headers takes longer than the two small functions
    settings.cpp_cache_precompile_headers = False
    norm = norm_of(16, torch.bfloat16, zero_centered=True, is_fused=True)
    plain = norm_of(16, torch.bfloat16, zero_centered=True, is_fused=False)
    for rows in (5, 2, 64, 1, 33):
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)).bfloat16()
        for got, want in zip(run(norm, x, x), run(plain, x, x), strict=True):
            assert_rows_close(got, want, 2**-7)
    assert counters["stats"]["unique_graphs"] == 2, counters
    for rows in (33, 1, 2):
        check_router(rows)
    # for each number of experts chosen, two ways
    assert counters["stats"]["unique_graphs"] == 2 + 4, counters


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_once_for_all_numbers_of_rows() -> None:
    """The other tests of a session run with compiling switched off."""
    environ = os.environ | {"TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from tests.unit.test_model_fusion import check_compiled; check_compiled()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=600)


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert fuses(Fusion.auto) is has_gpu
        assert fuses(Fusion.compile)
        assert not fuses(Fusion.none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fused = build_transformer_config(RunConfig(train=TrainConfig(fusion=Fusion.compile)))
    assert fused.is_fused
    assert fused.use_te_activation_func
