"""AdamW in pieces against torch's; moments in fewer bits; what is on the host; temporaries of the update."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from msa_train.config import GradsDtype, MomentsDtype, OptimConfig, Precision
from msa_train.config.optimizer_bytes import PIECE_ELEMENTS, optimizer_bytes
from msa_train.training.optim import block_scaled, host_stream, tiled_adamw
from msa_train.training.optim.block_scaled import BlockScaled
from msa_train.training.optim.grad_buffers import sum_of_squares
from msa_train.training.optim.rounding import add_to_bf16, to_bf16
from msa_train.training.optim.tiled_adamw import TiledAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((100, 101), (7,), (300, 33), (1,), (64, 64))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that parameters of these tests have several pieces."""
    monkeypatch.setattr(tiled_adamw, "PIECE_ELEMENTS", 4096)
    monkeypatch.setattr(tiled_adamw, "STREAMED_ELEMENTS", 2048)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, steps: int, first: int = 0, scale: float = 1.0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.grad = gradient * scale * 10.0 ** -(step % 5)
        optimizer.step()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_as_torch(dtype: torch.dtype, foreach: bool) -> None:
    theirs, ours = parameters(dtype), parameters(dtype)
    run(torch.optim.AdamW(theirs, foreach=foreach, **SETTINGS), 12)
    optimizer = TiledAdamW(ours, **SETTINGS)
    run(optimizer, 12)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert all(int(optimizer.state[p]["step"]) == 12 for p in ours)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("moves_weights", [True, False])
@pytest.mark.parametrize("moments", MomentsDtype)
def test_states_on_the_host_change_no_bit(moments: MomentsDtype, moves_weights: bool) -> None:
    theirs, ours = parameters(), parameters()
    run(TiledAdamW(theirs, moments_dtype=moments, **SETTINGS), 6)
    copies = ours if moves_weights else []
    run(TiledAdamW(ours, moments_dtype=moments, offload=0.6, copies=copies, **SETTINGS), 6)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_on_the_host_is_what_was_asked_for(share: float) -> None:
    some = [nn.Parameter(torch.empty(100)) for _ in range(50)]
    assert len(tiled_adamw._share(some, share)) == round(50 * share)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("moments", "distance"), [(MomentsDtype.bf16, 0.01), (MomentsDtype.fp8, 0.1)])
def test_fewer_bits_stay_near(moments: MomentsDtype, distance: float) -> None:
    """Distance of the weights from fp32 moments, as a share of how far they have moved."""
    start, wide, ours = parameters(), parameters(), parameters()
    run(torch.optim.AdamW(wide, **SETTINGS), 40)
    run(TiledAdamW(ours, moments_dtype=moments, **SETTINGS), 40)
    moved = sum(float((a - b).square().sum()) for a, b in zip(start, wide, strict=True))
    off = sum(float((a - b).square().sum()) for a, b in zip(ours, wide, strict=True))
    assert 0 < (off / moved) ** 0.5 < distance


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("moments", MomentsDtype)
def test_goes_on_bit_for_bit_from_fp32_copies_of_its_state(moments: MomentsDtype) -> None:
    named, copies = parameters(), parameters()
    first = TiledAdamW(named, moments_dtype=moments, **SETTINGS)
    second = TiledAdamW(copies, moments_dtype=moments, offload=0.5, copies=copies, **SETTINGS)
    run(first, 3)
    for source, target in zip(named, copies, strict=True):
        target.data.copy_(source.data)
        state = second.moments_of(target)
        for name in ("exp_avg", "exp_avg_sq"):
            wide = torch.empty(source.shape)
            wide.copy_(first.state[source][name].detach().cpu())
            state[name].copy_(wide)
        state["step"].fill_(3.0)
    run(first, 2, first=3)
    run(second, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(named, copies, strict=True))


def test_a_state_dict_of_another_precision_is_taken_over() -> None:
    theirs, ours = parameters(), parameters()
    wide = torch.optim.AdamW(theirs, **SETTINGS)
    run(wide, 2)
    low = TiledAdamW(ours, moments_dtype=MomentsDtype.fp8, **SETTINGS)
    low.load_state_dict(wide.state_dict())
    moment = low.state[ours[0]]["exp_avg"]
    assert isinstance(moment, BlockScaled)
    assert torch.allclose(moment.float(), wide.state[theirs[0]]["exp_avg"], rtol=0.13, atol=1e-3)


@pytest.mark.parametrize("is_root", [False, True])
def test_fp8_keeps_what_it_has_and_the_mean_of_the_rest(is_root: bool) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    values = values.square() if is_root else values
    kept = BlockScaled.zeros(values.shape, values.device, is_root=is_root, pin=False)
    total = torch.zeros_like(values)
    for salt in range(200):
        kept.write(values, salt)
        total += kept.float()
    assert abs(float((total / 200 - values).sum() / values.abs().sum())) < 2e-3
    again = BlockScaled.zeros(values.shape, values.device, is_root=is_root, pin=False)
    again.copy_(kept.float())
    assert torch.equal(again.float(), kept.float())
    # nothing is divided by zero later
    assert not is_root or bool((kept.float() > 0).all())
    with pytest.raises(TypeError, match="in place"):
        kept.mul_(2)


def test_second_moments_shrink_without_gradients() -> None:
    """The nearest e4m3 of 0.95 x is x; by chance it shrinks in the mean as fp32 does."""
    kept = BlockScaled.zeros(torch.Size([16384]), torch.device("cpu"), is_root=True, pin=False)
    kept.copy_(torch.rand(16384, generator=torch.Generator().manual_seed(0)) + 0.5)
    before = float(kept.float().mean())
    for salt in range(60):
        kept.write(kept.float() * 0.95, salt)
    assert float(kept.float().mean()) == pytest.approx(before * 0.95**60, rel=0.05)


def test_values_that_are_not_finite_stay_so() -> None:
    assert to_bf16(torch.tensor([float("inf"), -float("inf")]), 0).tolist() == [float("inf"), -float("inf")]
    assert to_bf16(torch.tensor([float("nan")]), 0).isnan().all()
    kept = BlockScaled.zeros(torch.Size([4]), torch.device("cpu"), is_root=False, pin=False)
    kept.copy_(torch.tensor([1.0, float("nan"), 2.0, float("inf")]))
    assert not kept.float().isfinite().all()


def test_bf16_sums_of_many_micro_batches_keep_small_addends() -> None:
    generator = torch.Generator().manual_seed(0)
    addends = [torch.randn(1000, generator=generator).mul(0.02).add(1.08).bfloat16() for _ in range(64)]
    ours, nearest = torch.zeros(1000).bfloat16(), torch.zeros(1000).bfloat16()
    for number, addend in enumerate(addends):
        add_to_bf16(ours, addend, piece=256)
        nearest += addend
        assert number or torch.equal(ours, addend)
    exact = torch.stack([a.double() for a in addends]).sum(0)
    ours_off, nearest_off = ((one - exact).mean().abs() for one in (ours.double(), nearest.double()))
    assert ours_off < 0.02 < nearest_off


def test_norm_in_pieces() -> None:
    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum_of_squares(flat), flat.square().sum(dtype=torch.float64))
    assert sum_of_squares(torch.ones(4).bfloat16()).item() == 4.0


def test_transfers_in_turn() -> None:
    """More groups than places, each changed once, unequal sizes."""
    groups = [[torch.full((size,), float(size)), torch.zeros(2 * size)] for size in (5, 3, 8, 1, 2)]
    seen: list[int] = []

    def change(number: int, copies: list[Tensor]) -> None:
        seen.append(number)
        copies[1].fill_(copies[0][0].item())

    host_stream.HostStream(torch.device("cpu")).run(groups, change)
    assert seen == list(range(5))
    assert [group[1].unique().tolist() for group in groups] == [[5.0], [3.0], [8.0], [1.0], [2.0]]


class _Peak(TorchDispatchMode):
    """Counts bytes of storages made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(t) for t in tree_iter((args, kwargs)) if type(t) in (Tensor, nn.Parameter)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if type(tensor) is Tensor and _storage(tensor) not in given | self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("grads", GradsDtype)
@pytest.mark.parametrize("offload", [0.0, 1.0])
@pytest.mark.parametrize("moments", MomentsDtype)
def test_temporaries_of_the_update(
    moments: MomentsDtype, offload: float, grads: GradsDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pieces 256 times as small: what one step makes is within what the planner counts, under 1 GiB."""
    smaller = 256
    for module, name in (
        (tiled_adamw, "PIECE_ELEMENTS"),
        (tiled_adamw, "STREAMED_ELEMENTS"),
        (block_scaled, "_WRITTEN"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) // smaller)
    parameter = nn.Parameter(torch.zeros(5 * PIECE_ELEMENTS // smaller + 100))
    optimizer = TiledAdamW(
        [parameter], moments_dtype=moments, offload=offload, copies=[parameter], **SETTINGS
    )
    optimizer.allocate()
    dtype = torch.bfloat16 if grads is GradsDtype.bf16 else torch.float32
    parameter.decoupled_grad = torch.zeros(parameter.shape, dtype=dtype)  # type: ignore[attr-defined]
    with _Peak() as peak:
        optimizer.step()
    settings = OptimConfig(moments_dtype=moments, grads_dtype=grads, offload=offload)
    want = optimizer_bytes(settings, Precision.bf16).step_temporary
    assert 0.5 * want < peak.peak * smaller <= want < 2**30
