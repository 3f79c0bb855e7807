"""Build a model whose weights ZeRO-3 cuts as soon as a module has them, so that no rank ever holds it whole.

A model of 70B parameters in bf16 takes 140 GB whole, on each of the 8 ranks of a node; built in parts on 256
ranks, .55 GB and the largest module at a time (2.4 GB for an embedding of 200,064 words and H = 6,144). By
arithmetic. DeepSpeed sends each weight from rank 0 before it cuts it: 140 GB to each node in all, seconds.
What is sent has no value yet: each is drawn after that on every rank, by name, which takes its own part.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from msa_train.training.engines.deepspeed.partitions import slice_of, whole_shape


class BuiltInParts:
    """Cut weights over all ranks within the context; give them values after it."""

    def __init__(self, deepspeed: Any, settings: Mapping[str, Any]) -> None:
        """Take DeepSpeed's settings.

        Args:
            deepspeed: the package.
            settings: DeepSpeed's JSON, which says where parts are kept.
        """
        # No tensor is made in another precision: an expert's bias is fp32 beside weights in bf16.
        self._context = deepspeed.zero.Init(config_dict_or_path=dict(settings), tensor_overrides=[])

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of a whole weight."""
        return whole_shape(parameter)

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Take this rank's part of a weight's value, which has its dtype, on the host."""
        begin, part = slice_of(parameter)
        part.copy_(value.view(-1)[begin : begin + part.numel()])
