"""What an exchange session keeps between the forward and the backward pass of a layer call."""

from torch import Tensor


class SavedTensors:
    """Base of sessions: in between autograd has the tensors, and drops them where a layer is recomputed."""

    def __init__(self, local: Tensor) -> None:
        """local: this rank's keys and values."""
        self._local: Tensor | None = local
        # Those of other ranks, where they are kept for the backward pass.
        self._fetched: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """This rank's keys and values."""
        assert self._local is not None, "the tensors were handed to autograd and not given back"
        return self._local

    def release(self) -> tuple[Tensor, ...]:
        """Tensors that the backward needs, for autograd to keep. The session forgets them."""
        local, fetched = self.local, self._fetched
        self._local = self._fetched = None
        return (local,) if fetched is None else (local, fetched)

    def restore(self, kept: tuple[Tensor, ...]) -> None:
        """The same tensors, or those of the recomputation, for the backward."""
        self._local, self._fetched = kept[0], kept[1] if len(kept) > 1 else None
