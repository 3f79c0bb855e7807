"""Say who is missing when a collective breaks or a rank stalls.

A thread of every rank (`fault_watch`) looks into the job's store now and then, even while the rank itself is
blocked in a collective. It says there that its rank is alive, and listens for the next rank of the job: one
that is silent for too long is stalled. Whoever notices this, or loses a collective, asks all ranks where they
stand. Who does not answer within a short grace is dead or stalled, and is named in the error of all others,
once for all.

Every look is two requests of a few bytes, at 256 ranks 1,024 per second for the one process that keeps the
store; an enquiry is a few requests of each rank, and two for each rank by the one that decides it.
"""

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from msa_train.parallel.comm.purposes import POINTS

# Seconds between looks at the store, and until a rank that does not answer counts as missing.
POLL_S = 0.5
GRACE_S = 5.0
# Longest time between two signs of life, and what a rank that has ended well adds to their number.
BEAT_S = 4.0
ENDED = 10**12
# What a collective raises that has lost another rank, as the libraries below put it
_LOST = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|socket (closed|timeout)|timed out|timeout"
    r"|remote process exited|peer closed|communicator (was|is) aborted|nccl(Remote|System)Error"
    r"|(read|write) error|Dist(Store|Network|Backend)Error|recvValue failed|failed to (recv|send)",
    re.IGNORECASE,
)
# Likewise of a rank that has no more memory, on a CPU; a GPU's is an error of its own
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)

# Of these every rank expects the same number of bytes.
_SAME_SIZE = ("index_key", "request_shape", "request")


class ExchangeError(RuntimeError):
    """Tell that a collective broke or a rank stalled; the text names layer, point and ranks."""


def has_lost_others(error: BaseException) -> bool:
    """Tell whether a collective raised this because another rank is gone or late."""
    # Errors of our own may quote such words, and say more.
    if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
        return False
    return bool(_LOST.search(f"{type(error).__name__}: {error}"))


def reason_of(error: BaseException) -> str:
    """Put an error's text on one line, without the source places that gloo and NCCL begin with."""
    return " ".join(re.sub(r"\[/[^\]]*\]", "", str(error)).split())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether this rank itself has no more memory, also where that shows inside a collective."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


@dataclass(slots=True)
class RankStatus:
    """Hold where a rank stands."""

    layer: int = 0
    "that it computes, from 1; 0: none"
    purpose: str = ""
    "of its last collective; empty before the first"
    waits: bool = False
    "it waits for this collective"
    num_bytes: int = 0
    "bytes that it expects of this collective"
    words: str = ""
    "the error that it ended with; empty while it lives"

    def fits(self, other: "RankStatus") -> bool:
        """Tell whether both are at the same point and, where all must be alike, expect as many bytes."""
        if (self.layer, self.purpose) != (other.layer, other.purpose):
            return False
        return self.purpose not in _SAME_SIZE or self.num_bytes == other.num_bytes

    def __str__(self) -> str:
        if not self.purpose:
            return "before the first collective"
        point = describe(self.layer, self.purpose)
        size = f", {self.num_bytes} bytes" if self.purpose in _SAME_SIZE else ""
        return f"{point}{size}" if self.waits else f"computing after {point}"


def describe(layer: int, purpose: str) -> str:
    """Put a point into words: 3, "kv" -> "layer 3, fetching keys and values (kv)"."""
    where = f"layer {layer}, " if layer else ""
    return f"{where}{POINTS[purpose]} ({purpose})" if purpose in POINTS else f"{where}{purpose}"
