"""Keep tensors of an exchange session between the forward and the backward pass of a layer call."""

from torch import Tensor


class SavedTensors:
    """Give a session's tensors to autograd in between, which drops them where a layer is recomputed."""

    def __init__(self, local: Tensor) -> None:
        """Keep `local`, this rank's keys and values."""
        self._local: Tensor | None = local
        # Those of other ranks, where they are kept for the backward pass.
        self._fetched: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """Give this rank's keys and values."""
        assert self._local is not None, "the tensors were handed to autograd and not given back"
        return self._local

    def release(self) -> tuple[Tensor, ...]:
        """Give up the tensors that the backward needs, for autograd to keep; the session forgets them."""
        # A reference here would keep the memory when autograd drops the tensors of a recomputed layer.
        local, fetched = self.local, self._fetched
        self._local = self._fetched = None
        return (local,) if fetched is None else (local, fetched)

    def restore(self, kept: tuple[Tensor, ...]) -> None:
        """Take back the same tensors, or those of the recomputation, for the backward."""
        self._local, self._fetched = kept[0], kept[1] if len(kept) > 1 else None
