"""flash-msa beside ours: why it cannot run here, and what its function is called with."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import rival_flash_msa as flash_msa
from benchmarks.gpu.problem import Tensors

SEQ_LEN = 256


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_msa, "find_spec", lambda _name: None)
    assert flash_msa.why_not() == (
        "flash-msa, nvidia-cutlass-dsl, cuda-python, flash-attn-4: not installed; "
        "benchmarks/gpu/wheels.sh --with-flash-msa fetches them"
    )


def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_msa, "find_spec", lambda name: None if "interface" in name else name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_says_what_its_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_hopper(monkeypatch)
    monkeypatch.setattr(flash_msa, "_PROGRAMS", ("no-such-compiler",))
    monkeypatch.setattr(flash_msa, "get_path", lambda _name: "/nowhere")
    found = flash_msa.why_not()
    assert found == "it compiles a CUDA file when first called; missing for that: no-such-compiler, Python.h"


@pytest.mark.parametrize("broken", [False, True])
def test_imports_it_last(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_hopper(monkeypatch)
    monkeypatch.setattr(flash_msa, "_lacking", list)
    module: Any = None if broken else ModuleType("flash_msa")
    monkeypatch.setitem(sys.modules, "flash_msa", module)
    found = flash_msa.why_not()
    assert (found or "").startswith("its import fails: ModuleNotFoundError") == broken
    assert (found is None) == (not broken)


class _Stand(torch.autograd.Function):
    """Takes and gives what flash_msa_func does."""

    @staticmethod
    def forward(
        ctx: Any, q_index: Tensor, k_index: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor]:
        topk, scale = rest
        assert (topk, scale) == (2048, 128**-0.5)
        assert q_index.shape == (1, 4, SEQ_LEN, 128)
        assert k_index.shape == (1, 1, SEQ_LEN, 128)
        assert q.shape == (1, 16, SEQ_LEN, 128)
        assert k.shape == v.shape == (1, 2, SEQ_LEN, 128)
        ctx.save_for_backward(q_index, k_index, q, k, v)
        return torch.zeros(1, SEQ_LEN, 16 * 128), torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert grads[0].shape == (1, SEQ_LEN, 16 * 128)
        assert float(grads[1]) == 1.0
        return *(torch.ones_like(saved) for saved in ctx.saved_tensors), None, None


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flash_msa")
    module.flash_msa_func = _Stand.apply
    monkeypatch.setitem(sys.modules, "flash_msa", module)
    tensors = Tensors(torch.device("cpu"), torch.float32, seed=1)
    forward, training_step = flash_msa.flash_msa_steps(tensors, SEQ_LEN)
    out, kl = cast(tuple[Tensor, Tensor], forward())
    assert not out.requires_grad
    assert not kl.requires_grad
    grads = cast(tuple[Tensor, ...], training_step())
    assert [grad.shape[1] for grad in grads] == [4, 1, 16, 2, 2]


def test_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script beside it finds it first, by the same name."""
    folder = str(Path(flash_msa.__file__).parent)
    monkeypatch.setattr(sys, "path", [folder, *sys.path])
    assert "flash-msa" in (flash_msa.why_not() or "flash-msa")
    assert folder not in sys.path


def test_ours_has_as_much_to_do() -> None:
    sizes = flash_msa.FLASH_MSA_SIZES
    assert sizes.num_heads == flash_msa.NUM_HEADS
    # index heads, selections per query and query heads of a selection
    assert sizes.num_kv_heads == flash_msa.NUM_INDEX_HEADS
    assert sizes.heads_per_group == flash_msa.NUM_HEADS // flash_msa.NUM_INDEX_HEADS
    assert sizes.topk * sizes.block_size == flash_msa.TOPK_TOKENS
