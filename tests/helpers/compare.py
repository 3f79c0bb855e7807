"""Comparison by the worst row: an average hides one lost block among thousands of good ones."""

from torch import Tensor


def worst_row(got: Tensor, want: Tensor) -> float:
    """Largest error of any row (last dim), relative to the largest value of `want`."""
    assert got.shape == want.shape, f"shapes differ: {tuple(got.shape)}, {tuple(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = got.detach(), want.detach()
    scale = float(want.double().abs().max())
    error = float((got.double() - want.double()).abs().max())
    return error / scale if scale > 0 else error


def assert_rows_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Fail with the position of the worst row unless every row is within `tolerance`."""
    error = worst_row(got, want)
    if not error <= tolerance:
        rows = (got.double() - want.double()).abs().reshape(-1, got.shape[-1] if got.dim() else 1)
        raise AssertionError(
            f"worst row {int(rows.amax(-1).argmax())} of {rows.shape[0]} is off by {error:.3g} "
            f"(relative to the largest value), allowed {tolerance:.3g}"
        )
