"""Draw hits by run, and f over training."""

from pathlib import Path
from typing import Any

from benchmarks.extension.recipe import LONG, MINI, NEEDLES, RUNS, STUDIED
from benchmarks.extension.shares import CP_SIZES

_COMPARED = {STUDIED: "-", "long_near": "--"}
"runs whose f is drawn, and how"


def plot(found: dict[str, Any], folder: Path) -> None:
    """Write extension_hits.png and extension_f.png; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed; pip install matplotlib")
        return
    matplotlib.use("Agg")
    _hits(found["evaluations"], folder / "extension_hits.png")
    _shares(found["f"], folder / "extension_f.png")


def _hits(evaluations: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    names = [f"{MINI}_short", f"{MINI}_long", *(run.name for run in RUNS)]
    figure, axes = pyplot.subplots(figsize=(10, 4))
    for place, task in enumerate(NEEDLES):
        found = [evaluations[name]["tasks"][f"{task}@{LONG}"] for name in names]
        x = [number + 0.27 * (place - 1) for number in range(len(names))]
        rates = [one["hit_rate"] for one in found]
        errors = [
            [one["hit_rate"] - one["hit_interval"][0] for one in found],
            [one["hit_interval"][1] - one["hit_rate"] for one in found],
        ]
        axes.bar(x, rates, 0.26, yerr=errors, label=task, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel(f"hits at {LONG:,} tokens")
    axes.set_ylim(0, 1.25)
    axes.legend(loc="upper center", ncols=len(NEEDLES))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shares(by_run: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CP_SIZES), figsize=(12, 3.4), sharey=True)
    for axes, cp_size in zip(panels, CP_SIZES, strict=True):
        for name, style in _COMPARED.items():
            steps = by_run[name]
            for number, layer in enumerate(next(iter(steps.values()), {}).get(str(cp_size), {})):
                values = [by_cp[str(cp_size)][layer] for by_cp in steps.values()]
                label = f"{name}, layer {layer}"
                axes.plot(list(map(int, steps)), values, style, color=f"C{number}", label=label, linewidth=1)
        axes.set_title(f"cp_size {cp_size}")
        axes.set_xlabel("step")
    panels[0].set_ylabel("f")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
