"""Start local workers on a stand-in: python -m tests.helpers.launcher_start CONFIG.yaml N [ENTRY]."""

import sys
from pathlib import Path

from launchers.local import launch_workers

if __name__ == "__main__":
    entry = (sys.argv[3:] or ["tests.helpers.launcher_worker:run"])[0]
    sys.exit(launch_workers(Path(sys.argv[1]), int(sys.argv[2]), entry=entry))
