"""How a worker that fails tells it: to the launcher by a file, else on stderr. Standard library only."""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

LAUNCHER_PID = "MSA_TRAIN_LAUNCHER_PID"


def record(error: BaseException) -> None:
    """Tell an exception: type, text, traceback and time."""
    rank = os.environ.get("RANK", "0")
    text = "".join(traceback.format_exception(error))
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        now = time.time()
        extra = {"py_callstack": text, "timestamp": str(int(now)), "time": now}
        message = f"{type(error).__name__}: {error}"
        partial = Path(f"{file}.partial")
        partial.write_text(
            json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8"
        )
        partial.replace(file)
    # The local launcher prints the first failure; rank 0 shares its terminal and must not repeat or drown it.
    if LAUNCHER_PID not in os.environ or rank != "0":
        print(f"msa-train: rank {rank} failed\n{text}", file=sys.stderr, flush=True)


def end_by(error: BaseException) -> NoReturn:
    """Tell it and end this process wherever it stands; for threads, while the main one may wait for ever."""
    record(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
