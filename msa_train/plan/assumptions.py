"""Hold what no arithmetic can know; every plan prints it."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(kw_only=True, slots=True, frozen=True)
class Assumptions:
    """State what is assumed of data, router, links and driver.

    Raises:
        ValueError: for a value that is out of range.
    """

    f: float = 0.2
    "share of the remote KV blocks, per KV head, that a rank's queries select"
    imbalance: float = 1.3
    "rows that the fullest rank's experts get over the mean"
    num_docs: int = 1
    "documents of equal length in a pack; one is the most attention work there can be"
    gpu_memory_gb: float = 80.0
    "memory of a GPU as its name says it, GB"
    context_gib: float = 0.6
    "CUDA context and libraries, GiB"
    nccl_gib: float = 2.0
    "buffers of NCCL's communicators, GiB"
    fragmentation: float = 0.04
    "share of a GPU's memory that the allocator cannot use"
    peak_flops: float = 989e12
    "dense bf16 peak of a GPU, FLOP/s, which MFU is a share of"
    memory_bytes_s: float = 3.35e12 * 0.8
    "bytes per second of a GPU's memory, for the optimizer step and other passes over memory"
    host_bytes_s: float = 50e9
    "bytes per second between a GPU and its host, one direction"
    gemm_efficiency: float = 0.85
    "speed of the experts' grouped products as a share of the projections' rate"

    def __post_init__(self) -> None:
        for name in ("f", "fragmentation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a share, from 0 to 1")
        if not self.imbalance >= 1:
            raise ValueError(f"imbalance={self.imbalance}: must be at least 1, the mean itself")
        if self.num_docs < 1:
            raise ValueError(f"num_docs={self.num_docs}: must be at least 1")
        for name in ("gpu_memory_gb", "peak_flops", "memory_bytes_s", "host_bytes_s", "gemm_efficiency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("context_gib", "nccl_gib"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")

    @property
    def visible_bytes(self) -> float:
        """Return what a driver shows of a GPU: 79.6 GiB of "80 GB", which its makers count in GiB nearly."""
        return self.gpu_memory_gb * 0.995 * GIB

    @property
    def usable_bytes(self) -> float:
        """Return what tensors may take: all but context, NCCL and fragmentation.

        Example: 80 GB -> 79.6 GiB - 0.6 - 2.0 - 4% = 73.8 GiB.
        """
        reserve = (self.context_gib + self.nccl_gib) * GIB
        return self.visible_bytes * (1 - self.fragmentation) - reserve

    def document_lengths(self, seq_len: int, block_size: int) -> tuple[int, ...]:
        """Return the tokens of each document of a pack, whole blocks of about equal number.

        Example: 3 documents of 8 blocks of 2 tokens -> 4, 6, 6.
        """
        blocks = seq_len // block_size
        starts = [n * blocks // self.num_docs * block_size for n in range(self.num_docs)]
        return tuple(stop - start for start, stop in zip(starts, [*starts[1:], seq_len], strict=True))
