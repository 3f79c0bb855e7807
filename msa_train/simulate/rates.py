"""Kernel rates: how fast a device does the parts of a layer, measured or assumed, with sources."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msa_train.config.text import excerpt
from msa_train.simulate.files import read_mapping

RATE_NAMES = (
    "projection_flops",
    "index_flops",
    "sparse_forward_flops",
    "sparse_backward_flops",
    "kl_flops",
    "full_forward_flops",
    "full_backward_flops",
    "copy_bytes",
    "layer_overhead_s",
)
KINDS = ("measured", "assumption")
_SHIPPED = Path(__file__).parent / "rates"


@dataclass(kw_only=True, slots=True)
class KernelRates:
    """Rates of one device; FLOPs as `shape.LayerShape` counts them.

    Raises:
        ValueError: for rates that are not positive.
    """

    name: str
    kind: str
    "measured or assumption, of the file as a whole"
    device: str
    projection_flops: float
    "FLOP/s of the projections' matrix products"
    index_flops: float
    "FLOP/s of index scoring with block maximum and top-k"
    sparse_forward_flops: float
    sparse_backward_flops: float
    kl_flops: float
    "FLOP/s of the KL loss in the backward pass"
    full_forward_flops: float
    full_backward_flops: float
    copy_bytes: float
    "bytes per second of packing, unpacking and adding rows, each row counted once"
    layer_overhead_s: float
    "time of a layer's forward pass that no size explains: launches, small operators"
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={excerpt(self.kind)}: must be one of {', '.join(KINDS)}")
        for name in RATE_NAMES:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name != "layer_overhead_s"):
                raise ValueError(f"{name}={value}: must be positive")


def shipped_rates() -> dict[str, Path]:
    """Rate files that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def load_rates(name_or_path: str) -> KernelRates:
    """Rates of a shipped file by name, or of a file.

    A file holds name, kind, device and, under `rates`, per field of RATE_NAMES a mapping of value and source.

    Raises:
        ValueError: if there is no such file, a rate is missing, unknown, not a number or without its source.
    """
    path = shipped_rates().get(name_or_path) or Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(
            f"rates={name_or_path}: is neither shipped ({', '.join(shipped_rates())}) nor a .yaml or "
            ".json file"
        )
    values = read_mapping(path)
    rates = values.get("rates")
    if not isinstance(rates, dict):
        raise ValueError(f"{path}: rates is missing; it must map each of {', '.join(RATE_NAMES)}")
    unknown = sorted(excerpt(str(name)) for name in rates if name not in RATE_NAMES)
    missing = [name for name in RATE_NAMES if name not in rates]
    if unknown or missing:
        what = f"{unknown[0]} is not a rate" if unknown else f"{missing[0]} is missing"
        raise ValueError(f"{path}: {what}; needed are {', '.join(RATE_NAMES)}")
    try:
        return KernelRates(
            name=str(values.get("name", path.stem)),
            kind=str(values.get("kind", "")),
            device=str(values.get("device", "")),
            sources={
                name: str(rates[name]["source"]) for name in RATE_NAMES if _has_source(name, rates[name])
            },
            **{name: _number(name, rates[name]["value"]) for name in RATE_NAMES},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _has_source(name: str, rate: Any) -> bool:
    if not isinstance(rate, dict) or not rate.get("source") or "value" not in rate:
        raise ValueError(f"rates.{name}: must have a value and its source")
    return True


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"rates.{name}={excerpt(str(value))}: must be a number") from None
