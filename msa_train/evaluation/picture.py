"""Draw hits by length and depth as an image, from numbers alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from msa_train.evaluation.rows import Row

_CELL, _GAP = 28, 2
_NONE, _BACK = (200, 200, 200), (255, 255, 255)
# share 0, 0.5, 1: red, yellow, green
_COLOURS = np.array([(215, 48, 39), (254, 224, 139), (26, 152, 80)], np.float64)


def heat_map(rows: Sequence[Row]) -> npt.NDArray[np.uint8] | None:
    """Draw a task: lengths from left to right, depths from top (0) to bottom (1), red to green.

    Args:
        rows: of one task and step.

    Returns:
        [height, width, 3] uint8; None where no row tells depths.

    Example: 2 lengths and 5 depths -> [152, 62, 3].
    """
    told = sorted((row for row in rows if "by_depth" in row), key=lambda row: row["length"])
    if not told:
        return None
    depths = sorted({depth for row in told for depth in row["by_depth"]}, key=float)
    size = _CELL + _GAP
    image = np.full((len(depths) * size + _GAP, len(told) * size + _GAP, 3), _BACK, np.uint8)
    for column, row in enumerate(told):
        for line, depth in enumerate(depths):
            hits, count = row["by_depth"].get(depth, (0, 0))
            top, left = line * size + _GAP, column * size + _GAP
            image[top : top + _CELL, left : left + _CELL] = colour(hits / count) if count else _NONE
    return image


def colour(share: float) -> npt.NDArray[np.uint8]:
    """Return the colour of a share, 0 to 1: [3] uint8."""
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    mixed = _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
    return mixed.round().astype(np.uint8)
