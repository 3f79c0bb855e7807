"""Start local workers on the stand-in for training: python -m tests.helpers.launcher_start CONFIG.yaml N."""

import sys
from pathlib import Path

from launchers.cli.quick_imports import quick_imports

with quick_imports():
    from launchers.local.elastic_agent import launch_workers

if __name__ == "__main__":
    entry = "tests.helpers.launcher_worker:run"
    sys.exit(launch_workers(Path(sys.argv[1]), int(sys.argv[2]), entry=entry))
