"""One rank's share of a pack, as tensors the layers read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.data import Pack
from msa_train.parallel.layout import Segment, ShardLayout, local_segments, prefix_splits


@dataclass(slots=True)
class LocalPack:
    """The tokens of one rank and where they lie. T local tokens, all int64 unless said.

    tokens, labels: [T]; labels are IGNORE_LABEL where there is no next token.
    position: [T] in the pack; doc_position: [T] in the token's document.
    valid: [T] bool, False for padding.
    cu_seqlens: [num_docs + 1] document starts of the whole pack.
    segments: document parts on this rank; send, receive: see `layout.prefix_splits`.
    """

    layout: ShardLayout
    tokens: Tensor
    labels: Tensor
    position: Tensor
    doc_position: Tensor
    valid: Tensor
    cu_seqlens: Tensor
    segments: list[Segment]
    send: list[int]
    receive: list[int]


def make_local_pack(pack: Pack, layout: ShardLayout, device: torch.device) -> LocalPack:
    """Cut this rank's shard out of a pack that every rank of the context-parallel group holds."""
    start, stop = layout.start, layout.start + layout.local_seq_len
    cu_seqlens, doc_lengths = pack.cu_seqlens.tolist(), pack.doc_lengths.tolist()
    position = torch.arange(start, stop)
    starts = torch.tensor(cu_seqlens)
    document = torch.searchsorted(starts, position, right=True) - 1
    doc_position = position - starts[document]
    valid = doc_position < torch.tensor(doc_lengths)[document]
    send, receive = prefix_splits(cu_seqlens, doc_lengths, layout.seq_len, layout.cp_rank, layout.cp_size)
    return LocalPack(
        layout=layout,
        tokens=torch.from_numpy(pack.tokens[start:stop]).to(device),
        labels=torch.from_numpy(pack.labels[start:stop]).to(device),
        position=position.to(device),
        doc_position=doc_position.to(device),
        valid=valid.to(device),
        cu_seqlens=starts.to(device),
        segments=local_segments(cu_seqlens, doc_lengths, start, stop),
        send=send,
        receive=receive,
    )
