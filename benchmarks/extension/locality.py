"""Evaluate a checkpoint under other rules of selection: what is sent, what is found, what is lost.

    python -m benchmarks.extension.locality RESULT.json run=extend_mini checkpoint.load=RUN ... (as msa-eval)

One process that holds the whole pack. For each rule all of what msa-eval measures, and f: the share of
remote (block, KV head) pairs that some query of a rank selects, for ranks that hold consecutive tokens, on
packs that one document fills.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.extension.selection_rules import Rule, applied, as_mask
from benchmarks.extension.shares import CP_SIZES
from launchers.evaluate import EVALUATE
from launchers.train import StartCommand, main
from msa_train.config import RunConfig
from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.training.evaluation_worker import loaded_checkpoint
from msa_train.training.worker import run_as_rank

RESULT = "MSA_TRAIN_LOCALITY_RESULT"
"environment variable with the path of the result"
RULES: tuple[Rule | None, ...] = (
    None,
    *(Rule(neighbours=count) for count in (8, 32, 128)),
    *(Rule(bonus=bonus) for bonus in (0.5, 1.0, 2.0, 4.0)),
)


def run_study(config: RunConfig) -> bool:
    """Evaluate under each rule as the only rank; the result goes to the file that `RESULT` names."""
    return run_as_rank(config, _study)


def _study(config: RunConfig, device: torch.device, watch: FaultWatch | None) -> bool:
    with loaded_checkpoint(config, device, watch) as (evaluator, step):
        results: list[dict[str, Any]] = []
        for rule in RULES:
            counted = Remote(evaluator.engine.stage.seq_len, evaluator.engine.config.attention.block_size)
            with applied(rule, counted.add):
                rows = evaluator.run(step, source="locality", within_stage=False)
            name = "the model's own" if rule is None else rule.name
            results.append({"rule": name, "f": counted.shares(), "rows": rows})
            print(name, {cp: round(sum(f) / len(f), 3) for cp, f in counted.means().items()}, flush=True)
            # after each of them: a study that is stopped has something to tell
            Path(os.environ[RESULT]).write_text(json.dumps(results, indent=1) + "\n")
    return False


class Remote:
    """Sum up f over packs of a length, by number of ranks and by layer."""

    def __init__(self, seq_len: int, block_size: int) -> None:
        self.seq_len, self.block_size = seq_len, block_size
        self._sums: dict[tuple[int, int], list[Tensor]] = {}

    def add(self, layer: int, block_indices: Tensor) -> None:
        """Count a layer's selection [T, M, K] of one pack; packs of other lengths are left out."""
        if len(block_indices) != self.seq_len:
            return
        for cp_size in CP_SIZES:
            f = remote_share(block_indices, self.seq_len // self.block_size, cp_size)
            self._sums.setdefault((cp_size, layer), []).append(f)

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """Return {cp_size: {layer: f of each KV head}}, means over packs."""
        result: dict[str, dict[str, list[float]]] = {}
        for (cp_size, layer), values in sorted(self._sums.items()):
            result.setdefault(str(cp_size), {})[str(layer)] = torch.stack(values).mean(0).tolist()
        return result

    def means(self) -> dict[str, list[float]]:
        """Return {cp_size: f of each layer}, means over packs and KV heads."""
        return {
            cp_size: [sum(heads) / len(heads) for heads in layers.values()]
            for cp_size, layers in self.shares().items()
        }


def remote_share(block_indices: Tensor, num_blocks: int, cp_size: int) -> Tensor:
    """Compute f of each KV head, [M]: remote blocks that some query of a rank takes, mean share over ranks.

    block_indices: [T, M, K], -1 for none; ranks hold consecutive tokens, a pack's blocks in equal numbers.
    Example: 4 tokens, blocks of one, cp_size 2, blocks {0}, {1}, {0, 2}, {3}: rank 0 needs none of its two
    remote blocks, rank 1 one of two: 0.25.
    """
    chosen = torch.stack([as_mask(rows, num_blocks).any(0) for rows in block_indices.chunk(cp_size)])
    shard = torch.arange(num_blocks) * cp_size // num_blocks
    remote = shard[None] != torch.arange(cp_size)[:, None]
    return (chosen & remote[:, None]).sum((0, 2)).double() / remote.sum()


def study(argv: list[str], command: StartCommand = EVALUATE) -> int:
    """Evaluate as msa-eval does, with this study in the place of the evaluation."""
    os.environ[RESULT] = str(Path(argv[0]).resolve())
    entry = "benchmarks.extension.locality:run_study"
    return main(argv[1:], StartCommand("locality", entry, command.help_text, command.adjust))


if __name__ == "__main__":
    sys.exit(study(sys.argv[1:]))
