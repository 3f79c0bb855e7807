"""Make samples on all ranks together: each makes some of them, and gives them to the others.

To make one of 1M tokens takes 5 to 8 s of a core. On 256 ranks 25 of them are made at a time, then each of
them is broadcast: 8 MB, 200 MB for 25, which every rank keeps until they are scored.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from msa_train.evaluation.tasks.sample import Needle, Sample
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups

_FIELDS = ("task", "length", "index", "depth", "ordered")


def own_indices(count: int, groups: Groups) -> list[int]:
    """Return the samples that this rank makes. Example: 5 on 2 ranks -> 0, 2, 4 and 1, 3."""
    return list(range(groups.rank, count, groups.world_size))


def share_samples(own: Sequence[Sample | None], count: int, groups: Groups) -> list[Sample]:
    """Give every rank all samples, in the order of their numbers. All ranks call it.

    Args:
        own: those of `own_indices`, in order; None for what did not fit, which all ranks do without.
        count: of all ranks.
        groups: of this rank.
    """
    waiting, samples = list(own), list[Sample]()
    for number in range(count):
        source = number % groups.world_size
        sample = waiting.pop(0) if source == groups.rank else None
        received = _broadcast(b"" if sample is None else to_bytes(sample), source, groups)
        if received:
            samples.append(from_bytes(received) if sample is None else sample)
    return samples


def _broadcast(content: bytes, source: int, groups: Groups) -> bytes:
    """Broadcast bytes: their number, then themselves."""
    if groups.world_size == 1:
        return content
    size = torch.tensor([len(content)], dtype=torch.int64, device=groups.device)
    with watched("evaluation"):
        dist.broadcast(size, source)
        sent = torch.zeros(int(size), dtype=torch.uint8)
        if source == groups.rank:
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        sent = sent.to(groups.device)
        dist.broadcast(sent, source)
    return sent.cpu().numpy().tobytes()


def to_bytes(sample: Sample) -> bytes:
    """Write a sample without its prompt: numbers as JSON, a line feed, tokens as int64."""
    record: dict[str, Any] = {name: getattr(sample, name) for name in _FIELDS}
    record["prefix"], record["references"] = sample.prefix, sample.references
    record["answers"] = sample.answers
    record["needles"] = [(one.start, one.stop, one.answer) for one in sample.needles]
    return json.dumps(record).encode() + b"\n" + sample.tokens.astype("<i8").tobytes()


def from_bytes(content: bytes) -> Sample:
    """Read what `to_bytes` wrote; the prompt is not kept."""
    head, _, tokens = content.partition(b"\n")
    record = json.loads(head)
    return Sample(
        **{name: record[name] for name in _FIELDS},
        prompt="",
        prefix=record["prefix"],
        references=tuple(record["references"]),
        tokens=np.frombuffer(tokens, "<i8").astype(np.int64),
        answers=tuple((start, stop) for start, stop in record["answers"]),
        needles=tuple(Needle(*one) for one in record["needles"]),
    )
