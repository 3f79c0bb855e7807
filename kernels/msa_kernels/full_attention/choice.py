"""Choose the library whose kernel computes full attention, by a rule over what this machine has.

The order on Hopper: FlashAttention 3, cuDNN, FlashAttention 2; on other GPUs FlashAttention 2 (cuDNN first on
newer ones); torch's own flash kernel where none of these is installed; torch on the CPU. What `auto` takes is
tried once on a small problem before it is relied on: a library that fails there is passed over.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

KERNELS = ("auto", "flash3", "flash2", "cudnn", "torch")
# the module that shows that a package is installed
_PACKAGES = {"flash3": "flash_attn_interface", "flash2": "flash_attn_2_cuda"}
_HALF = (torch.bfloat16, torch.float16)
_HOPPER = (9, 0)
# cuDNN's backward pass is sure to have a kernel up to here
_CUDNN_MOST_DIM = 128
_FLASH_MOST_DIM = 256


@dataclass(slots=True, frozen=True)
class Machine:
    """Hold what the rule asks about a device."""

    capability: tuple[int, int]
    "compute capability of the GPU; (0, 0): a CPU"
    flash3: bool = False
    "FlashAttention 3 is installed"
    flash2: bool = False
    "flash-attn is installed"
    cudnn: bool = False
    "torch has cuDNN"


@dataclass(slots=True, frozen=True)
class Choice:
    """Hold the kernel to run and why."""

    name: str
    "one of KERNELS, not `auto`"
    reason: str
    "why this one, for the log"


@cache
def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> Choice:
    """Choose the kernel for calls on a device; looked up once per process and kind of call.

    Args:
        kernel: one of KERNELS.
        device: of all tensors.
        dtype: of all tensors.
        head_dim: D.
        deterministic: gradients must repeat bit by bit (`torch.are_deterministic_algorithms_enabled()`).

    Raises:
        ValueError: on an unknown name, and where the kernel that was asked for cannot run; a text that names
            the value, the rule and the fix.
    """
    machine, failed = find_machine(device), dict[str, str]()
    while True:
        choice = choose_by_rule(kernel, machine, dtype, head_dim, deterministic=deterministic, failed=failed)
        if kernel != "auto" or choice.name == "torch" or not torch.cuda.is_available():
            return choice
        reason = _try_out(choice.name, device, dtype, head_dim)
        if reason is None:
            return choice
        failed[choice.name] = reason


def choose_by_rule(
    kernel: str,
    machine: Machine,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool = False,
    failed: dict[str, str] | None = None,
) -> Choice:
    """Choose from facts alone.

    Args:
        kernel, dtype, head_dim, deterministic: as in `choose`.
        machine: what is there.
        failed: kernels that are to be passed over, with the reason.

    Raises:
        ValueError: as `choose`.

    Example: auto on Machine((9, 0), flash2=True, cudnn=True) for bf16 and 128 channels -> cudnn.
    """
    if kernel not in KERNELS:
        raise ValueError(f"full_kernel={kernel}: must be one of {', '.join(KERNELS)}")
    if kernel == "torch":
        return Choice("torch", "as configured")
    order = ("flash3", "cudnn", "flash2") if machine.capability >= _HOPPER else ("flash2", "cudnn", "flash3")
    refusals = {
        name: _why_not(name, machine, dtype, head_dim, deterministic) or (failed or {}).get(name)
        for name in order
    }
    if kernel != "auto":
        if refusals[kernel] is not None:
            raise ValueError(f"full_kernel={kernel}: {refusals[kernel]}; use full_kernel=auto")
        return Choice(kernel, "as configured")
    if machine.capability == (0, 0):
        return Choice("torch", "on the CPU")
    # on older GPUs than Hopper cuDNN is not known to be faster than torch's flash kernel
    candidates = [name for name in order if name != "cudnn" or machine.capability >= _HOPPER]
    for name in candidates:
        if refusals[name] is None:
            passed = [f"{other}: {refusals[other]}" for other in candidates[: candidates.index(name)]]
            return Choice(name, "; ".join(passed) or f"fastest on compute capability {_text(machine)}")
    return Choice("torch", "; ".join(f"{name}: {refusals[name]}" for name in candidates))


def find_machine(device: torch.device) -> Machine:
    """Find out what a device has; without a GPU at hand (tracing), a Hopper with what is installed here."""
    if device.type != "cuda":
        return Machine((0, 0))
    machine = installed_machine()
    if not torch.cuda.is_available():
        return machine
    major, minor = torch.cuda.get_device_capability(device)
    return replace(machine, capability=(major, minor))


def installed_machine() -> Machine:
    """Return a Hopper with what is installed here, for questions that no GPU has to answer."""
    return Machine(
        capability=_HOPPER,
        flash3=_installed("flash3"),
        flash2=_installed("flash2"),
        cudnn=torch.backends.cudnn.is_available(),
    )


def describe_choice(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Say in a line what `choose` takes, for the log.

    Raises:
        ValueError: as `choose`.

    Example: "full attention by cudnn: flash3: not installed".
    """
    choice = choose(kernel, device, dtype, head_dim, torch.are_deterministic_algorithms_enabled())
    return f"full attention by {choice.name}: {choice.reason}"


def takes_flash(dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether flash kernels of GPUs take these tensors; others run in torch's tiles."""
    return dtype in _HALF and head_dim % 8 == 0 and head_dim <= _FLASH_MOST_DIM


def _why_not(
    name: str, machine: Machine, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str | None:
    """Return why a kernel cannot run; None where it can."""
    has = {"flash3": machine.flash3, "flash2": machine.flash2, "cudnn": machine.cudnn}
    checks: tuple[tuple[bool, Callable[[], str]], ...] = (
        (machine.capability != (0, 0), lambda: "runs on GPUs"),
        (dtype in _HALF, lambda: f"dtype={str(dtype).removeprefix('torch.')}: has bfloat16 and float16 only"),
        (takes_flash(dtype, head_dim), lambda: f"head_dim={head_dim}: must be a multiple of 8, at most 256"),
        (has[name], lambda: "not installed" if name in _PACKAGES else "torch has no cuDNN here"),
        (
            name != "flash3" or machine.capability[0] == _HOPPER[0],
            lambda: f"runs on Hopper, not on compute capability {_text(machine)}",
        ),
        (name != "flash2" or machine.capability >= (8, 0), lambda: "needs compute capability 8.0"),
        (name != "cudnn" or head_dim <= _CUDNN_MOST_DIM, lambda: f"head_dim={head_dim}: must be at most 128"),
        (name != "cudnn" or not deterministic, lambda: "its gradients do not repeat bit by bit"),
    )
    return next((text() for fits, text in checks if not fits), None)


def _installed(name: str) -> bool:
    """Find out whether a package is there, without importing it."""
    return find_spec(_PACKAGES[name]) is not None


def _try_out(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compute a small problem; return why the result is of no use, None where it is good."""
    trial = importlib.import_module("msa_kernels.full_attention.trial")
    return trial.try_out(name, device, dtype, head_dim)


def _text(machine: Machine) -> str:
    return f"{machine.capability[0]}.{machine.capability[1]}"
