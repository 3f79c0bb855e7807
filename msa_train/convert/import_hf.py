"""Import a Hugging Face checkpoint, box by box: no more than one box is ever in memory.

Cost: every weight is read once and written once; M3 in bf16 is 852 GB in 22,980 boxes of at most 64 MiB.
Boxes of an expert are whole experts or parts of one, so an expert-parallel rank later reads what it needs and
no more.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from msa_train.checkpoint.torch_dist.files import ShardedWriter
from msa_train.convert.config_read import HfModel
from msa_train.convert.contents import ContentCheck
from msa_train.convert.fp8_weights import StoredWeights
from msa_train.convert.tensor_map import Span, TensorTable, build_table, detect_naming

BOX_BYTES = 64 * 2**20
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Box:
    """Cut out part of one of our tensors, and name the rows of theirs that it is put together from.

    Example: 10 rows of expert 2 of [4, 32, 8] from its row 16 on: offsets (2, 16, 0), sizes (1, 10, 8).
    """

    key: str
    "our name of the tensor"
    offsets: tuple[int, ...]
    "first index of the box in each dimension"
    sizes: tuple[int, ...]
    "elements of the box in each dimension"
    spans: tuple[Span, ...]
    "rows of theirs, in the order of the box's rows"


@dataclass(slots=True)
class ImportPlan:
    """Hold everything about an import, before a weight is read."""

    table: TensorTable
    "tensors under both names"
    weights: StoredWeights
    "tensors in the files"
    unplaced: list[str]
    "names of tensors in the files that have no place in our model"

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the tensors that have a place, in the type they are trained from."""
        shapes = self.table.hf_shapes.items()
        return sum(math.prod(shape) * self.weights.dtype(name).itemsize for name, shape in shapes)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Return the types of the matrices that have a place."""
        shapes = self.table.hf_shapes.items()
        return {self.weights.dtype(name) for name, shape in shapes if len(shape) > 1}


def plan_import(folder: Path, hf: HfModel) -> ImportPlan:
    """Match the tensors in the files with those of the model.

    Raises:
        ValueError: one line, if a tensor is missing, or has another shape or an unknown dtype.
    """
    weights = StoredWeights(folder, hf.fp8_block)
    entries = weights.entries
    # names decide the spelling, config.json decides which tensors and shapes there must be
    table = build_table(hf.model, hf.attention, detect_naming(entries))
    lacking = [name for name in table.hf_shapes if name not in entries]
    if lacking:
        raise ValueError(
            f"{folder}: lacks {_listed(lacking)}, which config.json asks for; fetch all files again"
        )
    for name, shape in table.hf_shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"tensor {name}: has shape {list(entry.shape)} where config.json gives {list(shape)}; "
                "correct config.json, or fetch both again"
            )
    # a tensor of ours has one dtype, so all that is fused into it must agree
    for key, spans in table.by_key().items():
        for one, other in pairwise(spans):
            if weights.dtype(one.name) is not weights.dtype(other.name):
                raise ValueError(
                    f"tensor {other.name}: has dtype {entries[other.name].dtype}, {one.name} has "
                    f"{entries[one.name].dtype}, and both are parts of {key}; store both alike"
                )
    # asks every tensor once: this is where an unknown dtype or a missing scale is found
    for name in table.hf_shapes:
        weights.dtype(name)
    # scales are used up by their weights and have no place of their own
    placed = table.hf_shapes.keys() | weights.scales()
    return ImportPlan(table, weights, [name for name in entries if name not in placed])


def check_unplaced(unplaced: Collection[str], *, skip: bool) -> None:
    """Refuse tensors that would be lost, unless that is wanted.

    Raises:
        ValueError: one line.
    """
    if unplaced and not skip:
        raise ValueError(
            f"{len(unplaced)} tensors have no place in the model: {_listed(list(unplaced))}; --skip-unplaced "
            "leaves them out, --dry-run lists all"
        )


def write_import(
    plan: ImportPlan,
    folder: Path,
    progress: Callable[[int], None],
    *,
    check: ContentCheck | None = None,
    box_bytes: int = BOX_BYTES,
) -> dict[str, Any]:
    """Write the checkpoint files.

    Args:
        plan: from `plan_import`.
        folder: exists and is empty.
        progress: told the bytes of each box.
        check: looks at the numbers; None: the usual one, whose warnings nobody hears.
        box_bytes: see `boxes`.

    Returns:
        Size and checksum of each file by name, for the manifest.

    Raises:
        ValueError: one line, for weights that are damaged.
    """
    check = check or ContentCheck(plan.table.hf_shapes)
    writer, weights = ShardedWriter(folder), plan.weights
    try:
        for box in boxes(plan, box_bytes):
            piece = torch.empty(box.sizes, dtype=weights.dtype(box.spans[0].name))
            # the box as rows: spans count them with the leading dimensions flattened
            rows = piece.view(-1, *box.sizes[-1:]) if len(box.sizes) > 1 else piece
            at = 0
            for span in box.spans:
                part = rows[at : at + span.num_rows]
                weights.read_into(span.name, span.name_row, part)
                check.add(span, part)
                at += span.num_rows
            writer.add(box.key, plan.table.shapes[box.key], box.offsets, piece)
            progress(piece.nbytes)
    finally:
        weights.close()
    # Megatron's loader asks every module for an extra state, if only an empty one
    for module, num_experts in plan.table.objects.items():
        writer.add_empty_object(f"{module}._extra_state", num_experts)
    writer.close()
    return writer.files


def boxes(plan: ImportPlan, box_bytes: int = BOX_BYTES) -> Iterator[Box]:
    """Cut our tensors into boxes of at most `box_bytes` (or one row), none of them over two experts.

    Example: an expert's gate and up of M3, [2 * 3072, 6144] in bf16, have 75 MB: boxes of 5,461 and 683 rows.
    """
    for key, spans in plan.table.by_key().items():
        shape = plan.table.shapes[key]
        columns = shape[-1] if len(shape) > 1 else 1
        max_rows = max(1, box_bytes // (columns * plan.weights.dtype(spans[0].name).itemsize))
        # 0: no experts, so boxes may begin anywhere
        rows_of_expert = shape[1] if len(shape) == 3 else 0
        for group in _groups(spans, max_rows, rows_of_expert):
            first, count = group[0].key_row, sum(span.num_rows for span in group)
            if len(shape) == 1:
                offsets, sizes = (first,), (count,)
            elif len(shape) == 2:
                offsets, sizes = (first, 0), (count, columns)
            else:
                expert, row = divmod(first, rows_of_expert)
                offsets, sizes = (expert, row, 0), (1, count, columns)
            yield Box(key, offsets, sizes, tuple(group))


def _groups(spans: list[Span], max_rows: int, rows_of_expert: int) -> Iterator[list[Span]]:
    """Group consecutive spans of at most max_rows rows together; longer ones are cut.

    Example: spans of 5 and 2 rows, max_rows 4 -> groups of 4 rows, and of 1 + 2 rows. Spans of 2, 2 and 2
    rows with rows_of_expert 4 and max_rows 10 -> 2 + 2 rows of expert 0, and 2 of expert 1.
    """
    group: list[Span] = []
    room = max_rows
    for span in spans:
        done = 0
        while done < span.num_rows:
            row = span.key_row + done
            # a box ends when it is full, and where the next expert begins
            if group and (room == 0 or (rows_of_expert and row % rows_of_expert == 0)):
                yield group
                group, room = [], max_rows
            count = min(room, span.num_rows - done)
            group.append(Span(span.name, span.name_row + done, span.key, row, count))
            done, room = done + count, room - count
    if group:
        yield group


def _listed(names: list[str]) -> str:
    """List the first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
