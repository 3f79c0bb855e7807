"""Runs a command, all of whose Python processes have pretended GPUs.

python -m tests.helpers.pretended_gpu.run [--gpus N] ./run.sh --system run=smoke parallel.cp_size=1 ...
"""

import argparse
import os
from pathlib import Path

from tests.helpers.pretended_gpu.build import build

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent


def environment(num_gpus: int) -> dict[str, str]:
    """Variables of the command, beside those of this process."""
    paths = [FOLDER / "site", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    return {
        "MSA_PRETEND_GPU": str(num_gpus),
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
        "PATH": os.pathsep.join([str(FOLDER / "bin"), os.environ.get("PATH", os.defpath)]),
    }


def main() -> None:
    """Become the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.pretended_gpu.run")
    parser.add_argument("--gpus", type=int, default=1, choices=range(1, 9), metavar="N")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command must follow")
    build()
    os.execvpe(arguments.command[0], arguments.command, os.environ | environment(arguments.gpus))


if __name__ == "__main__":
    main()
