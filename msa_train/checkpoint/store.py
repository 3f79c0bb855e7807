"""Keep the checkpoint folders of a run: published whole or not at all. Standard library only.

run_dir/checkpoints/
    step_00000100/              published: Megatron's files and
        meta.json                   step, data position, model, layout
        manifest.json               size and CRC-32 of every other file
    .step_00000200.partial/     being written, or left by a crash
    latest -> step_00000100     moved when another one is published

Files are brought to the disk, then the folder gets its name, then `latest` is moved: whoever looks at any
moment, or after a crash at any moment, finds under step_* and behind `latest` only whole checkpoints.

CRC-32 because its enemy is a disk or a crash, and it is several times faster than any digest of hashlib.
It is no signature: against a forger, nothing in a checkpoint is executed, see torch_dist/safe_pickles.py.
The form of manifest.json stays as it is, whatever meta.json's format_version becomes.
"""

import math
import os
import secrets
import shutil
from pathlib import Path

from msa_train.checkpoint.manifest import MANIFEST_NAME, PUBLISHED, read_meta, structure_damage, verify_folder
from msa_train.checkpoint.meta import META_NAME
from msa_train.runtime.atomic_files import free_bytes, sync
from msa_train.runtime.fencing import check_not_superseded

LATEST_NAME = "latest"


class CheckpointStore:
    """Keep the checkpoints of one run. Writing (`begin`, `publish`, `abandon`, `prune`) is for rank 0."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir).expanduser() / "checkpoints"
        self._last_published: int | None = None
        "step that this process published or went back to last"
        self._left_over: set[str] = set()
        "names that could not be removed, which the user knows of"

    def path(self, step: int) -> Path:
        """Name the folder of a published step: 100 -> checkpoints/step_00000100."""
        return self.folder / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Name the folder of a step that is being written: 100 -> checkpoints/.step_00000100.partial."""
        return self.folder / f".step_{step:08d}.partial"

    def steps(self) -> list[int]:
        """List the published steps, ascending, damaged ones included."""
        if not self.folder.is_dir():
            return []
        # something else of that name is a checkpoint that was damaged
        matches = [PUBLISHED.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def clear(self) -> list[str]:
        """Make the folder of all checkpoints, and remove what earlier crashes left in it.

        Another process may be removing the same, and some of it may be impossible to remove.

        Returns:
            A line about each leftover that stays, once.
        """
        check_not_superseded(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = [self._discard(leftover) for leftover in self.folder.glob(".step_*")]
        return [note for note in notes if note]

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot be finished.

        Args:
            num_bytes: that all ranks together will write.

        Raises:
            OSError: one line with what is needed, what there is, and which checkpoint stays.
        """
        free = free_bytes(self.folder)
        if free >= num_bytes:
            return
        saved = self.steps()
        kept = f"the checkpoint of step {max(saved)} stays" if saved else "there is no checkpoint yet"
        raise OSError(
            f"it needs {num_bytes / 1e9:.3g} GB and {self.folder} has {free / 1e9:.3g} GB free, {kept}; "
            "free some space, or lower checkpoint.keep_last"
        )

    def begin(self, step: int) -> Path:
        """Make the folder to write into, after removing what earlier crashes left."""
        self.clear()
        return self.make_partial(step)

    def make_partial(self, step: int) -> Path:
        """Make the folder to write into; what could not be removed under its name is moved out of its way."""
        partial = self.partial(step)
        if os.path.lexists(partial):
            hidden = self._hidden(partial)
            partial.rename(hidden)
            # told by `clear` under its first name
            self._left_over.add(hidden.name)
        partial.mkdir()
        return partial

    def publish(self, step: int) -> Path:
        """Bring the written folder to the disk and make it visible in one rename.

        Raises:
            SupersededError: if another start has taken over.
            OSError: if the disk cannot.
        """
        partial, target = self.partial(step), self.path(step)
        for name in (META_NAME, MANIFEST_NAME):
            assert (partial / name).is_file(), f"{name} must be written before step {step} is published"
        # Before the rename: after a crash a file system may have kept the new name and lost the content.
        for path in (*partial.rglob("*"), partial):
            sync(path)
        check_not_superseded(self.folder.parent)
        # Only a run that went back behind a damaged checkpoint comes to the same step again.
        replaced = self._hidden(target)
        if os.path.lexists(target):
            target.rename(replaced)
        partial.rename(target)
        # names are content of the folder above
        sync(self.folder)
        self._discard(replaced)
        self._last_published = step
        # last, for it must never lead to what is not there yet
        self._point_latest(target)
        return target

    def _point_latest(self, target: Path) -> None:
        """Let `latest` lead to this checkpoint, in one rename: to a finished one at every moment.

        Where the file system knows no links there is no `latest`; nothing in a run reads it.
        """
        name = f".{LATEST_NAME}.{secrets.token_hex(8)}.partial"
        partial, link = self.folder / name, self.folder / LATEST_NAME
        try:
            partial.symlink_to(target.name)
            self._take_away_copy(link)
            partial.replace(link)
        except OSError:
            partial.unlink(missing_ok=True)

    def _take_away_copy(self, link: Path) -> None:
        """Take `latest` away where a tool that follows links has made a folder of it.

        It is a checkpoint again if its own is no longer there, else one too many.
        """
        if link.is_symlink() or not link.is_dir():
            return
        hidden = self._hidden(link)
        link.rename(hidden)
        try:
            own = self.path(read_meta(hidden)["step"])
        except (OSError, ValueError, KeyError, TypeError):
            own = None
        if own is not None and not os.path.lexists(own) and structure_damage(hidden) is None:
            hidden.rename(own)
        else:
            self._discard(hidden)

    def _hidden(self, path: Path) -> Path:
        """Make a name for what is to be removed, which nobody else has: .step_00000100.3f2a....removed."""
        name = path.name.strip(".").removeprefix("step_")
        return self.folder / f".step_{name}.{secrets.token_hex(8)}.removed"

    def _discard(self, path: Path) -> str:
        """Remove a folder, or a link and not what it leads to; returns why it stays, once, if it does."""
        try:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                # as far as possible, whoever else removes the same; then again, for the reason
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    shutil.rmtree(path)
        except FileNotFoundError:
            return ""
        except OSError as error:
            if path.name not in self._left_over:
                self._left_over.add(path.name)
                return f"{path} is left over and could not be removed ({error.strerror}); remove it by hand"
        return ""

    def remove_after(self, step: int) -> list[int]:
        """Remove published checkpoints of later steps, newest first: the run has gone back to this one.

        Newest first, so that a crash on the way leaves no gap between those that stay.

        Returns:
            The removed steps.
        """
        removed = [later for later in reversed(self.steps()) if later > step]
        # first, so that `latest` does not lead to one that is gone
        self._point_latest(self.path(step))
        for later in removed:
            self._remove(later)
        self._last_published = step
        return removed

    def _remove(self, step: int) -> None:
        """Remove a published checkpoint, unless another start has taken over."""
        check_not_superseded(self.folder.parent)
        # out of sight first: a removal that is cut short must not look like a damaged checkpoint
        hidden = self._hidden(self.path(step))
        try:
            self.path(step).rename(hidden)
        except FileNotFoundError:
            # another process was faster
            return
        self._discard(hidden)

    def abandon(self, step: int) -> None:
        """Remove what was written of a step that will not be published, as far as possible."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def prune(
        self, keep_last: int, keep_every: int = 0, *, keep_stage_ends: bool = True, dry_run: bool = False
    ) -> list[int]:
        """Remove published checkpoints except the last `keep_last` sound ones; 0 keeps all.

        One that was saved among bad steps, as a stopped run must, does not count: the run may go back.

        A checkpoint later than the one published last is damaged (else the run had started from it): it does
        not count, and stays until the run comes to its step.

        Example: of steps 100, 200, ..., 600 keep_last=2 removes 400, 300, 200 and 100, with keep_every=300
        only 400, 200 and 100. If 500 was saved among bad steps, the latter removes 200 and 100: 600 and 400
        are the last two, and 500 stays besides.

        Args:
            keep_last: sound checkpoints that stay, however old.
            keep_every: so do those of steps that are multiples of it; 0: of none.
            keep_stage_ends: so do those with which a stage ended and another began.
            dry_run: remove nothing.

        Returns:
            The removed steps, newest first.
        """
        removed: list[int] = []
        if keep_last == 0:
            return removed
        limit = math.inf if self._last_published is None else self._last_published
        num_kept = 0
        for step in reversed([step for step in self.steps() if step <= limit]):
            if num_kept < keep_last:
                num_kept += self._is_kept(step)
                continue
            if keep_every and step % keep_every == 0:
                continue
            if keep_stage_ends and self._ends_stage(step):
                continue
            if not dry_run:
                self._remove(step)
            removed.append(step)
        return removed

    def _is_kept(self, step: int) -> bool:
        """Tell whether a run can go on from it whatever comes: not from one saved among bad steps."""
        if self.verify(step, full=False) is not None:
            return False
        record = read_meta(self.path(step)).get("bad_steps", {})
        return not (isinstance(record, dict) and record.get("in_a_row"))

    def _ends_stage(self, step: int) -> bool:
        """Tell whether a stage ended with it; of a damaged one nothing is known."""
        return self.verify(step, full=False) is None and bool(read_meta(self.path(step)).get("ends_stage"))

    def verify(self, step: int, *, full: bool = True) -> str | None:
        """Check a checkpoint: None if it is sound, else what is wrong with it, in one line.

        Args:
            step: a published step.
            full: read every file and compare checksums; otherwise only names, sizes, meta.json and
                manifest.json.
        """
        return verify_folder(self.path(step), full=full)
