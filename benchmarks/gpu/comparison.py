"""Compare a kernel with fp64, and say how far apart the two may be."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of a score, relative to the largest: products are exact, their sums are fp32.
SCORE_ROUNDING = 1e-5
# Of an fp32 number.
ROUNDING = 2.0**-23


@dataclass(frozen=True, slots=True)
class Check:
    """Hold the error of the worst row and what it may be."""

    name: str
    error: float
    allowed: float
    text: str = ""
    """Why nothing could be compared, if so."""

    @property
    def passed(self) -> bool:
        """Tell whether the error is allowed; NaN is not."""
        return not self.text and self.error <= self.allowed


def failed(name: str, text: str) -> Check:
    """Make a check that could not be made."""
    return Check(name, float("nan"), 0.0, text)


def worst_row(got: Tensor, want: Tensor) -> float:
    """Return the largest error of any value; NaN if any is."""
    return float((got.detach().double() - want.double()).abs().max())


def allowed(plain: Tensor, exact: Tensor) -> float:
    """Return twice the error of plain torch; of a single number, hit by chance, its rounding too."""
    rounding = ROUNDING * float(exact.abs().max()) if exact.numel() == 1 else 0.0
    return 2 * worst_row(plain, exact) + rounding


def against_plain(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> Check:
    """Compare with fp64; plain torch in the same dtype says how much error is usual."""
    return Check(name, worst_row(ours, exact), allowed(plain, exact))


def selection_check(
    name: str, scores: Tensor, block_indices: Tensor, first: Tensor, own: Tensor, topk: int
) -> Check:
    """Check that a selection is one, and how far below the best left-out block a taken one lies.

    Args:
        name: of the check.
        scores: [T, M, NB] fp64 scores of whole blocks.
        block_indices: [T, M, K] int, what was selected, one forced block; -1 for none.
        first, own: [T] first block of the query's document, and its own.
        topk: K.

    Returns:
        The check; its error is relative to the largest score.
    """
    T, M, NB = scores.shape
    ids = block_indices.long()
    block = torch.arange(NB, device=scores.device)
    candidate = ((block >= first[:, None]) & (block < own[:, None]))[:, None].expand_as(scores)
    chosen = torch.zeros(T, M, NB + 1, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter_(2, torch.where(ids >= 0, ids, NB), True)[..., :NB]
    wanted = (own - first + 1).clamp(max=topk)
    legal = (chosen & ~candidate).sum(-1) == 1
    legal &= chosen.gather(2, own[:, None, None].expand(-1, M, 1)).squeeze(-1)
    legal &= chosen.sum(-1) == wanted[:, None]
    if not bool(legal.all()):
        return failed(name, f"{int((~legal).sum())} rows are no selection at all")
    worst_in = scores.masked_fill(~(chosen & candidate), float("inf")).amin(-1)
    best_out = scores.masked_fill(chosen | ~candidate, float("-inf")).amax(-1)
    gap = (best_out - worst_in).clamp(min=0.0).max() / scores.abs().max()
    return Check(name, float(gap), SCORE_ROUNDING)
