"""Draw curves over training of the learning benchmark, mean over seeds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

Runs = dict[str, dict[int, list[dict[str, Any]]]]
"rows of measurements by variant and seed"
_Value = Callable[[dict[str, Any]], float | None]
_MAIN = "msa"
"the variant shown layer by layer"


def plot(runs: Runs, folder: Path) -> list[Path]:
    """Write learning_{text,accuracy,recall,f}.png; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed; pip install matplotlib")
        return []
    matplotlib.use("Agg")
    text = {"text loss, nats per byte": _by_variant(runs, lambda row: row["text_loss"])}
    accuracy = {"lookup accuracy": _by_variant(runs, lambda row: row["accuracy"])}
    recall = {
        "block recall, mean over layers": _by_variant(runs, _recall),
        f"block recall of {_MAIN}": dict(_recall_by_layer(runs.get(_MAIN, {}), "block_recall")),
        f"score recall of {_MAIN}": dict(_recall_by_layer(runs.get(_MAIN, {}), "score_recall")),
    }
    shares = {
        f"f of {_MAIN} at cp_size {cp_size}": dict(_f_by_group(runs.get(_MAIN, {}), cp_size))
        for cp_size in _cp_sizes(runs)
    }
    panels = {"text": text, "accuracy": accuracy, "recall": recall, "f": shares}
    return [_figure(panel, folder / f"learning_{name}.png") for name, panel in panels.items()]


_Curve = dict[int, float]
"value by tokens"


def _curve(by_seed: dict[int, list[dict[str, Any]]], value: _Value) -> _Curve:
    """Compute the mean over seeds of a figure of the rows that have it."""
    points: dict[int, list[float]] = {}
    for rows in by_seed.values():
        for row in rows:
            number = value(row)
            if number is not None:
                points.setdefault(row["tokens"], []).append(number)
    return {tokens: mean(points[tokens]) for tokens in sorted(points)}


def _by_variant(runs: Runs, value: _Value) -> dict[str, _Curve]:
    return {variant: _curve(by_seed, value) for variant, by_seed in runs.items()}


def _recall(row: dict[str, Any]) -> float | None:
    values = [layer["block_recall_text"] for layer in row["layers"].values()]
    return mean(values) if values else None


def _recall_by_layer(by_seed: dict[int, list[dict[str, Any]]], name: str) -> Iterator[tuple[str, _Curve]]:
    for layer in _last_layers(by_seed):
        for place, label in (("text", "all positions"), ("query", "lookups")):

            def value(row: dict[str, Any], layer: str = layer, key: str = f"{name}_{place}") -> float | None:
                return row["layers"][layer][key] if row["layers"] else None

            yield f"layer {layer}, {label}", _curve(by_seed, value)


def _f_by_group(by_seed: dict[int, list[dict[str, Any]]], cp_size: str) -> Iterator[tuple[str, _Curve]]:
    for layer, found in _last_layers(by_seed).items():
        for group in range(len(found["f"][cp_size])):

            def value(row: dict[str, Any], layer: str = layer, group: int = group) -> float | None:
                return row["layers"][layer]["f"][cp_size][group] if row["layers"] else None

            yield f"layer {layer}, group {group}", _curve(by_seed, value)


def _last_layers(by_seed: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the selection figures by layer of any finished run."""
    return next((rows[-1]["layers"] for rows in by_seed.values()), {})


def _cp_sizes(runs: Runs) -> list[str]:
    return next((list(layer["f"]) for layer in _last_layers(runs.get(_MAIN, {})).values()), [])


def _figure(panels: dict[str, dict[str, _Curve]], path: Path) -> Path:
    """Draw one panel per title beside each other, one line per curve."""
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(1, max(len(panels), 1), figsize=(5 * max(len(panels), 1), 4))
    for axes, (title, curves) in zip(figure.axes, panels.items(), strict=False):
        for label, curve in curves.items():
            axes.plot([tokens / 1e6 for tokens in curve], list(curve.values()), label=label)
        axes.set(xlabel="million tokens", title=title)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
