"""Hand a run on from the processes of one stage to those of the next. Standard library only.

Processes that have trained their last step save, leave run_dir/next_stage.json and end. Who started them
starts the next ones, with the stage's name in the environment: they are laid out for it before they know of
any checkpoint. A start without it looks the stage up in the newest checkpoint, so a run that was killed
between two stages goes on like any other.

Cost of a change, by arithmetic for m3 on 256 ranks (docs/checkpoints.md): a save and a load, 6.0 TB written
and 6.1 TB read over all ranks, about 24 GB each way a rank, besides the start of the processes.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from msa_train.runtime.atomic_files import new_file
from msa_train.runtime.untrusted_files import read_record

MARK_NAME = "next_stage.json"
VARIABLE = "MSA_TRAIN_STAGE"


@dataclass(kw_only=True, slots=True)
class NextStage:
    """Record where processes ended for others: content of run_dir/next_stage.json."""

    step: int
    "optimizer steps made and saved"
    stage: str
    "whose processes are to begin"
    generation: str
    "fencing token of the start that the processes belonged to; empty where it had none"


def asked_stage() -> str:
    """Return the stage that this process was started for, empty where nobody has said."""
    return os.environ.get(VARIABLE, "")


def write_next(run_dir: str | Path, mark: NextStage) -> None:
    """Leave the mark; it appears whole or not at all."""
    with new_file(Path(run_dir) / MARK_NAME) as file:
        file.write(json.dumps(asdict(mark)) + "\n")


def read_next(run_dir: str | Path) -> NextStage | None:
    """Read the mark, None if the last processes ended for another reason.

    Raises:
        ValueError: one line, if the file is damaged.
    """
    path = Path(run_dir) / MARK_NAME
    try:
        return NextStage(**read_record(path, {field.name: field.type for field in fields(NextStage)}))
    except FileNotFoundError:
        return None


def clear_next(run_dir: str | Path) -> None:
    """Remove the mark of earlier processes."""
    (Path(run_dir) / MARK_NAME).unlink(missing_ok=True)
