"""Compute f over training from what runs recorded: remote blocks that some query of a rank selected.

f is the share of remote (block, KV head) pairs, mean over ranks that hold consecutive tokens, by layer.
"""

from pathlib import Path

import numpy as np

from msa_train.simulate.selections.recorded import RecordedSelections, read_selections
from msa_train.training.metrics.selection_recording import FOLDER_NAME

CP_SIZES = (2, 4, 8, 16)


def shares_over_training(run_dir: Path, seq_len: int) -> dict[int, dict[str, dict[str, float]]]:
    """Return {step: {cp_size: {layer: f}}} of a run's recordings, ascending; mean over KV heads.

    Packs of other lengths than `seq_len` tokens, and those of several documents, are left out: nobody selects
    blocks of another document.

    Example: {50: {"2": {"1": 0.98, "2": 0.91}, ...}, 100: ...}.
    """
    found: dict[int, dict[str, dict[str, float]]] = {}
    for folder in sorted((run_dir / FOLDER_NAME).glob("step_*")):
        layers = read_selections(folder)
        if layers[0].seq_len != seq_len or not fills_pack(layers[0]):
            continue
        found[int(folder.name.removeprefix("step_"))] = {
            str(cp_size): {str(layer.layer): share(layer, cp_size) for layer in layers}
            for cp_size in CP_SIZES
        }
    return found


def fills_pack(selection: RecordedSelections) -> bool:
    """Tell whether one document has nine tenths of the pack or more."""
    return int(np.diff(selection.cu_seqlens).max()) >= 0.9 * selection.seq_len


def share(selection: RecordedSelections, cp_size: int) -> float:
    """Compute f of one layer for ranks with consecutive tokens.

    Example: 4 chunks of a block, one KV head, that select blocks {0}, {0, 1}, {1, 2}, {0, 3}; on 2 ranks the
    first needs none of its two remote blocks and the second both: 0.5.
    """
    num_blocks = selection.seq_len // selection.block_size
    chunks = np.array_split(np.arange(selection.bits.shape[0]), cp_size)
    shares: list[float] = []
    for rank, own in enumerate(chunks):
        union = np.bitwise_or.reduce(selection.bits[own], axis=0)
        needed = np.unpackbits(union, axis=-1, count=num_blocks).astype(bool)
        remote = np.arange(num_blocks) * cp_size // num_blocks != rank
        shares.append(float(needed[:, remote].mean()))
    return float(np.mean(shares))
