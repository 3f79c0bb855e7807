"""Try a library's kernel on a small problem before a run relies on it: does it run, are its numbers right?"""

from typing import Any

import torch
from torch import Tensor

from msa_kernels.full_attention import op, tiled

# relative to the largest value: some roundings of 16 bits, nothing near a wrong mask or head
_TOLERANCE = 0.03
_ROWS, _GROUP = 192, 2


def try_out(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a kernel is of no use on this device; None where it is good. Takes some milliseconds.

    Two KV heads of two query heads each: queries of two documents against their own keys, causally, and
    against keys that all of them see, as two ranks would have them.

    Args:
        name: of a `choice.Choice`. device, dtype, head_dim: of the calls that are to follow.
    """
    try:
        errors = _errors(name, device, dtype, head_dim)
    except Exception as error:  # every library has its own errors for what it does not take
        text = str(error).partition("\n")[0]
        return f"failed on a small problem: {type(error).__name__}: {text}"
    bad = [f"{what} {error:.2g}" for what, error in errors.items() if not error <= _TOLERANCE]
    return f"wrong on a small problem: relative error of {', '.join(bad)}" if bad else None


def _errors(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, dout = normal(_ROWS, 2, _GROUP, head_dim), normal(_ROWS, 2, _GROUP, head_dim)
    k, v = normal(_ROWS, 2, head_dim), normal(_ROWS, 2, head_dim)
    found: dict[str, float] = {}
    for causal, cu_k in ((True, [0, 70, _ROWS]), (False, [0, 33, _ROWS])):
        cu: tuple[Any, ...] = ([0, 70, _ROWS], cu_k, causal, head_dim**-0.5, name)
        module = op.module_of(name, q)
        out, lse = tiled.forward(q, k, v, *cu)
        got_out, got_lse = module.forward(q, k, v, *cu)
        flat = lse.flatten(0, 1)
        want = (out, flat, *tiled.backward(dout, q, k, v, out, flat, *cu))
        got = (got_out, got_lse.reshape(flat.shape), *module.backward(dout, q, k, v, out, flat, *cu))
        for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
            found[what] = max(found.get(what, 0.0), error)
    return found
