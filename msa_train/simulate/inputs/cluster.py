"""Describe clusters: ranks of a node, and what intra-node and inter-node links carry."""

from dataclasses import dataclass, replace
from pathlib import Path

from msa_train.simulate.inputs.settings_file import build, read_mapping

GIGA = 1e9


@dataclass(kw_only=True, slots=True)
class Cluster:
    """Describe the links of a cluster of equal nodes.

    Rates are those of one rank and one direction, as a data sheet has them; `link_efficiency` is the share
    that large transfers reach. Ranks are numbered node by node.

    Raises:
        ValueError: for a rate, latency or share that is out of range.
    """

    name: str
    "for reports"
    gpus_per_node: int
    "ranks that share the fast links"
    node_rate_bytes: float
    "bytes per second between ranks of a node (NVLink)"
    network_rate_bytes: float
    "bytes per second of a rank to other nodes"
    node_latency_s: float
    "start of an intra-node message, s"
    network_latency_s: float
    "start of an inter-node message, s"
    host_sync_s: float
    "a small copy to the host that the next launch waits for, s"
    link_efficiency: float = 1.0
    "share of a rate that large transfers reach"
    multi_rail_collectives: bool = True
    "gathers and scatters cross the network once per node, spread over its ranks' network cards (NCCL does)"
    node_uplink_bytes: float = 0.0
    "bytes per second between a node and the others, shared by its ranks; 0: no limit of its own"
    one_link: bool = False
    "node_rate_bytes is one link that intra-node and inter-node messages share (Ethernet), not two kinds"
    host_s_per_byte: float = 0.0
    "processor seconds of a received byte, where processors and not adapters move the data"
    compute_share: float = 1.0
    "share of a device that a rank computes on; below 1 where processes share processor cores"
    source: str = ""
    "where the figures come from"

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "node_rate_bytes", "network_rate_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in (
            "node_latency_s",
            "network_latency_s",
            "host_sync_s",
            "node_uplink_bytes",
            "host_s_per_byte",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("link_efficiency", "compute_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and at most 1")

    @property
    def node_rate(self) -> float:
        """Return the bytes per second inside a node that large transfers reach."""
        return self.node_rate_bytes * self.link_efficiency

    @property
    def network_rate(self) -> float:
        """Return the bytes per second between nodes that large transfers reach."""
        return self.network_rate_bytes * self.link_efficiency

    def num_nodes(self, cp_size: int) -> int:
        """Count the nodes that a group of ranks fills.

        Example: 8 per node: 4 ranks -> 1, 16 ranks -> 2, 12 ranks -> an error.

        Raises:
            ValueError: if it does not fill whole nodes.
        """
        if cp_size > self.gpus_per_node and cp_size % self.gpus_per_node:
            raise ValueError(
                f"cp_size={cp_size}: must be at most gpus_per_node={self.gpus_per_node} or a multiple of it"
            )
        return max(1, cp_size // self.gpus_per_node)


_DGX = "NVIDIA DGX {0} user guide and data sheet: {1}"
_ASSUMED = "latencies, host_sync_s and link_efficiency are assumptions"

# data sheets give NVLink for both directions together and network cards in bits: 900 GB/s / 2, 400 Gbit/s / 8
_H100 = Cluster(
    name="h100",
    gpus_per_node=8,
    node_rate_bytes=450 * GIGA,
    network_rate_bytes=50 * GIGA,
    node_latency_s=5e-6,
    network_latency_s=10e-6,
    host_sync_s=20e-6,
    link_efficiency=0.8,
    source=_DGX.format("H100", "NVLink 900 GB/s both ways, one 400 Gbit/s ConnectX-7 per GPU; ") + _ASSUMED,
)
PRESETS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        _H100,
        replace(
            _H100,
            name="h100_100g",
            network_rate_bytes=12.5 * GIGA,
            network_latency_s=20e-6,
            source="nodes as in h100 with 100 Gbit/s per GPU, as cloud machines on Ethernet have it; "
            + _ASSUMED,
        ),
        replace(
            _H100,
            name="a100",
            node_rate_bytes=300 * GIGA,
            network_rate_bytes=25 * GIGA,
            source=_DGX.format("A100", "NVLink 600 GB/s both ways, one 200 Gbit/s ConnectX-6 per GPU; ")
            + _ASSUMED,
        ),
        replace(
            _H100,
            name="b200",
            node_rate_bytes=900 * GIGA,
            source=_DGX.format("B200", "NVLink 1.8 TB/s both ways, one 400 Gbit/s ConnectX-7 per GPU; ")
            + _ASSUMED,
        ),
        replace(
            _H100,
            name="gb200_nvl72",
            gpus_per_node=72,
            node_rate_bytes=900 * GIGA,
            source="NVIDIA GB200 NVL72 data sheet: 72 GPUs on NVLink 1.8 TB/s both ways, 400 Gbit/s per GPU; "
            + _ASSUMED,
        ),
    )
}


def load_cluster(name_or_path: str) -> Cluster:
    """Load a preset by name, or the cluster of a YAML or JSON file.

    Raises:
        ValueError: if it is neither, or a value does not fit.
    """
    # a preset's name wins over a file of that name, which has a suffix anyway
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(
            f"cluster={name_or_path}: is neither a preset ({', '.join(PRESETS)}) nor a .yaml or .json file"
        )
    values = read_mapping(path)
    return build(Cluster, {"name": path.stem, **values}, where=str(path))
