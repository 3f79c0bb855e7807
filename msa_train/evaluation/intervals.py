"""Say how sure a share is."""

import math
from collections.abc import Sequence

# two-sided 95%
_Z = 1.959964


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share; 0 to 1 where nothing was counted.

    Unlike the usual one it says something where all or none succeed.
    Example: 8 of 10 -> 0.490 to 0.943; 10 of 10 -> 0.722 to 1; 25 of 25 -> 0.867 to 1.
    """
    if count <= 0:
        return 0.0, 1.0
    share, z2 = successes / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # exact where rounding would leave 1e-17
    return max(middle - half, 0.0) if successes > 0 else 0.0, min(middle + half, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and half of its normal 95% interval; infinite for fewer than two values.

    Example: 1, 3 -> 2 and 1.96.
    """
    mean = math.fsum(values) / max(len(values), 1)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _Z * math.sqrt(variance / len(values))


def share_text(share: float, count: float) -> str:
    """Write a share with its interval: "0.80 [0.49, 0.94]"."""
    low, high = wilson(share * count, count)
    return f"{share:.2f} [{low:.2f}, {high:.2f}]"
