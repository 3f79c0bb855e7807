"""Compile small functions into one kernel each: `torch.compile`, made safe for tokens that vary in number.

A function that is fused takes and returns tensors and is never differentiated: its caller is an
`autograd.Function` that fuses the backward pass apart. So what is saved for the backward pass never depends
on what the compiler chose, and a recomputed layer saves what its forward pass did, whichever version it
meets.

The number of tokens, the first dimension, is marked dynamic: one version serves all of them. 0 and 1 rows,
which the compiler would make versions for, run as they are written. A version is compiled for each
combination of the other sizes and dtypes, a dozen in all, by every process at its start; compiled code is
kept on disk (TORCHINDUCTOR_CACHE_DIR) and found again.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# versions of one function: heads of queries, keys and index branch, norms of layers, each for every dtype
_MOST_VERSIONS = 64


def fused(function: _Function) -> _Function:
    """Return `function` compiled, for calls that record no gradient.

    Positional tensors of two or more dimensions, and vectors as long as these, have rows in the first one,
    which may vary from call to call; everything else is compiled in. `__wrapped__` is the function itself.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        rows = {arg.shape[0] for arg in tensors if isinstance(arg, Tensor) and arg.dim() > 1}
        if not rows or min(rows) < 2:
            return function(*tensors, **kwargs)
        for arg in tensors:
            if isinstance(arg, Tensor) and arg.dim() and arg.shape[0] in rows:
                torch._dynamo.mark_dynamic(arg, 0)
        return _compiled(function)(*tensors, **kwargs)

    return call  # type: ignore[return-value]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # imported at first use: it takes seconds
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _MOST_VERSIONS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * _MOST_VERSIONS)
    return torch.compile(function, fullgraph=True, dynamic=False)
