"""Tell which code a job runs: the commit and what was changed since, or the version of the package."""

import importlib.metadata
import subprocess
from pathlib import Path

import msa_train

# git status of a checkout on a slow shared file system; without an answer the job is submitted all the same
GIT_WITHIN_S = 60


def code_version() -> tuple[dict[str, str], str]:
    """Find out what to write down about this code; it takes four calls of git.

    Returns:
        {"version", "commit", "changed"}, the last two only in a git checkout, and the changes as a diff
        against the commit, files that git does not know included by name.
    """
    root = Path(__file__).resolve().parents[2]
    version = {"version": _package_version()}
    commit = _git(root, "rev-parse", "HEAD")
    # an installed package may lie in another repository, whose commit says nothing about it
    if commit is None or _git(root, "ls-files", "--error-unmatch", "launchers/slurm/code_version.py") is None:
        return version, ""
    status = _git(root, "status", "--porcelain") or ""
    unknown = [line[3:] for line in status.splitlines() if line.startswith("??")]
    diff = _git(root, "diff", "HEAD", "--binary") or ""
    diff += "".join(f"# not in git: {name}\n" for name in unknown)
    return {**version, "commit": commit.strip(), "changed": "yes" if status else "no"}, diff


def _package_version() -> str:
    """Read the version of the installed package, or of this source where it is not installed."""
    try:
        return importlib.metadata.version("msa-train")
    except importlib.metadata.PackageNotFoundError:
        return msa_train.__version__


def _git(root: Path, *arguments: str) -> str | None:
    """Run git and return its output, None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=GIT_WITHIN_S,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
