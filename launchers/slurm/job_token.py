"""Keep a secret of one start of a job in run_dir: who can read it there belongs to the job.

All nodes of the job share run_dir and run as its owner; other users of the cluster may reach the ports of a
node, but cannot read a file of mode 0600. The secret itself never goes over the network, only signatures by
it. It costs one small file per start, read once by every node: 32 reads on 32 nodes.
"""

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from msa_train.config import printable

# between two looks for the file
_WAIT_S = 0.1
# hexadecimal digits, so 128 bits; a file that is still being written has fewer
_MIN_LENGTH = 32


def token_path(run_dir: Path, start: str) -> Path:
    """Name the token's file; the batch script writes the same name.

    Each start has one of its own: nodes may still have the file of the last start in their caches.

    Args:
        run_dir: of the run.
        start: as `slurm_generation` has it.

    Example: "12345.1" -> slurm/.token-12345.1; "" -> slurm/.token-alone.
    """
    return run_dir / "slurm" / f".token-{start or 'alone'}"


def read_token(path: Path, *, create: bool, timeout_s: float) -> bytes:
    """Read the token of this start.

    Args:
        path: see `token_path`.
        create: make it where there is none: one process of the job, while the others wait.
        timeout_s: longest wait for the file, in seconds.

    Raises:
        OSError: if it cannot be read in time.
        ValueError: if others can read it or have written it.
    """
    if create and not path.exists():
        _create(path)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # not through a link; mode and owner are those of the file that was opened, not of the name
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status, token = os.fstat(file.fileno()), file.read(4096).strip()
            if len(token) >= _MIN_LENGTH:
                break
        # a shared file system may show the file to this node only some seconds later
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise ValueError(f"{printable(path)}: is empty; remove it and start the job again")
        time.sleep(_WAIT_S)
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise ValueError(
            f"{printable(path)}: must belong to you and be readable by you alone (mode 0600), as it tells "
            "the job's nodes from strangers; remove it, use a run_dir on a file system that keeps modes, or "
            "cluster.preflight=false"
        )
    return token


def sign(token: bytes, *parts: bytes) -> str:
    """Authenticate what is sent: the parts, of any length, under the token.

    Every part goes in with its length, so that b"ab", b"c" and b"a", b"bc" have different signatures.

    Returns:
        HMAC-SHA256, 64 hexadecimal digits.
    """
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.new(token, text, hashlib.sha256).hexdigest()


def is_signed(signature: object, token: bytes, *parts: bytes) -> bool:
    """Tell whether a signature is that of the parts; takes the same time wherever it differs."""
    given = signature if isinstance(signature, str) else ""
    return hmac.compare_digest(given.encode("utf-8", "replace"), sign(token, *parts).encode())


def _create(path: Path) -> None:
    """Write a new token, readable by its owner alone from the first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    # a reader sees it whole or not at all
    partial.replace(path)
