"""Find the configuration folder and list what can be chosen in it. Imports nothing heavy: --help needs it."""

from collections.abc import Sequence
from pathlib import Path

OPTION_GROUPS = (
    "run",
    "model",
    "attention",
    "parallel",
    "exchange",
    "data",
    "optim",
    "deepspeed",
    "train",
    "stages",
    "checkpoint",
    "evaluation",
    "logging",
    "launcher",
    "watchdog",
)

# chosen by msa-submit alone: where a run computes is no part of it
CLUSTER = "cluster"


def config_dir() -> Path:
    """Find the folder of the YAML files."""
    return shipped_file("conf/config.yaml").parent


def shipped_file(name: str) -> Path:
    """Find a file that is no Python: inside the package of a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: if it is in neither.
    """
    package = Path(__file__).resolve().parents[1]
    # inside first: beside an installed package is site-packages, where another project may have a conf/
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name} in {package} or {package.parent}; install msa-train again")


def group_options(group: str, config_dirs: Sequence[Path] = ()) -> dict[str, str]:
    """List the options of a group, each with the first comment of its file, e.g. {"tiny": "4 layers, ..."}.

    Args:
        group: one of OPTION_GROUPS, or CLUSTER.
        config_dirs: folders of the user's besides ours.
    """
    folders = (config_dir(), *config_dirs)
    paths = [path for folder in folders for path in sorted((folder / group).glob("*.yaml"))]
    return {path.stem: _description(path) for path in paths}


def _description(path: Path) -> str:
    """Read the first comment of a file, which says what the option is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""
