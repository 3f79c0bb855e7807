"""Tell the failure of a worker: to the launcher by a file, else on stderr. Standard library only."""

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from msa_train.config.environment import STORE_FILE
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
        content = json.dumps({"message": {"message": message, "extraInfo": extra}})
        is_recorded = _write(Path(file), content)
        spare = spare_file(os.environ, rank)
        if not is_recorded and spare is not None:
            is_recorded = _write(spare, content)
    # The local launcher prints the first failure; rank 0 shares its terminal and must not repeat or drown it.
    if LAUNCHER_PID not in os.environ or rank != "0" or not is_recorded:
        # the first line says who is to blame, whatever else torchrun and srun print
        _say(f"msa-train: rank {rank} failed: {one_line(error)}" + (f"\n{text}" if text else ""))


def spare_file(environ: Mapping[str, str], rank: int | str) -> Path | None:
    """Find where a rank records its error if run_dir's disk is full; None in a job of several machines."""
    store = environ.get(STORE_FILE)
    return Path(store).with_name(f"rank{rank}.error.json") if store else None


def _write(path: Path, content: str) -> bool:
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as full:
        # the disk may be what failed in the first place; the terminal takes it in any case
        _say(f"msa-train: {path}: {full.strerror}")
        return False
    return True


def _is_plain(error: BaseException) -> bool:
    """Tell if the text says all, or the output does: there is nothing that a traceback could explain."""
    plain = {"parallel.comm.job_store": "JobIncompleteError", "runtime.watchdog": "StalledError"}
    modules = {name: sys.modules.get(f"msa_train.{name}") for name in plain}
    return any(isinstance(error, getattr(modules[name], plain[name], ())) for name in plain)


def _say(text: str) -> None:
    print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def end_by(error: BaseException) -> NoReturn:
    """Tell it and end this process wherever it stands; for threads, while the main one may wait for ever."""
    record(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: that would end the calling thread alone
    os._exit(1)
