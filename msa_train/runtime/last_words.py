"""Tell the failure of a worker: to the launcher by a file, else on stderr. Standard library only."""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from msa_train.config.text import one_line, printable

LAUNCHER_PID = "MSA_TRAIN_LAUNCHER_PID"


def record(error: BaseException) -> None:
    """Tell an exception: type, text, traceback and time.

    The file is the one that torch's elastic agent names in TORCHELASTIC_ERROR_FILE, in its own format.
    """
    rank = os.environ.get("RANK", "0")
    text = "" if _is_plain(error) else "".join(traceback.format_exception(error))
    file, is_recorded = os.environ.get("TORCHELASTIC_ERROR_FILE"), False
    if file:
        now = time.time()
        extra = {"py_callstack": text, "timestamp": str(int(now)), "time": now}
        message = f"{type(error).__name__}: {error}"
        partial = Path(f"{file}.partial")
        content = json.dumps({"message": {"message": message, "extraInfo": extra}})
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(file)
            is_recorded = True
        except OSError as full:
            # the disk may be what failed in the first place; the terminal takes it in any case
            _say(f"msa-train: {file}: {full.strerror}")
    # The local launcher prints the first failure; rank 0 shares its terminal and must not repeat or drown it.
    if LAUNCHER_PID not in os.environ or rank != "0" or not is_recorded:
        told = f"failed\n{text}" if text else f"failed: {one_line(error)}"
        _say(f"msa-train: rank {rank} {told}")


def _is_plain(error: BaseException) -> bool:
    """Tell if the text says all: no rank has done anything yet that a traceback could explain."""
    module = sys.modules.get("msa_train.parallel.comm.job_store")
    return module is not None and isinstance(error, module.JobIncompleteError)


def _say(text: str) -> None:
    print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def end_by(error: BaseException) -> NoReturn:
    """Tell it and end this process wherever it stands; for threads, while the main one may wait for ever."""
    record(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: that would end the calling thread alone
    os._exit(1)
