"""Tell what a run says about the checkpoint that it starts from."""

from msa_train.checkpoint.find import find_to_resume
from msa_train.config import RunConfig


def resume_notes(config: RunConfig) -> list[str]:
    """Find the checkpoint as the launcher does; its messages, none where there is no checkpoint.

    Raises:
        ValueError: as `find_to_resume`.
    """
    found = find_to_resume(config)
    return found.messages if found else []
