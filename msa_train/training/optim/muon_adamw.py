"""Update for engine=torch: AdamW alone, or torch's Muon for the layers' matrices and AdamW beside it.

Every rank holds whole matrices (dense ones replicated, experts its own), so Muon needs no communication.

Muon adds momentum, makes the result nearly orthogonal (all singular values near 1), and moves by
rate * sqrt(max(1, rows / columns)). The root is torch's factor: it lets a matrix that maps to more dimensions
move its outputs as much as a square one. Pieces of [head_dim, hidden] have factor 1.

Weight decay is decoupled and multiplied by the rate of its own optimizer, as in torch: Muon's matrices shrink
by muon_lr * weight_decay a step, AdamW's by lr * weight_decay. With the defaults, 0.02 and 3e-4, that is 67
times as much for the same optim.weight_decay. It is meant so: each step moves a matrix by its own rate, and
if the decay follows that rate, the size of weights at which both balance depends on weight_decay alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msa_train.config import OptimConfig, OptimizerKind
from msa_train.config.lr_schedule import LearningRates
from msa_train.model.attention.index_branch import is_index_parameter
from msa_train.training.optim.stored_moments import stored
from msa_train.training.optim.tiled_adamw import TiledAdamW


class MuonAdamW:
    """Put one or two torch optimizers behind one step, with moments under AdamW's names."""

    def __init__(
        self,
        optim: OptimConfig,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        head_dim: int,
        copies: Sequence[nn.Parameter] = (),
    ) -> None:
        """Build the optimizers.

        Args:
            optim: the settings.
            parameters: names in the model and what is updated (fp32 copies of 16-bit parameters).
            head_dim: rows of one head in the fused query/key/value projections, which Muon takes by head.
            copies: those of the parameters that the model does not compute with; optim.offload moves them.
        """
        self.optim = optim
        self._parameters = [p for _, p in parameters]
        # Pieces of each of Muon's parameters: views of its rows, each made orthogonal on its own.
        self._pieces: dict[int, list[nn.Parameter]] = {
            id(p): _pieces(name, p, head_dim) for name, p in parameters if self._is_muon(name, p)
        }
        self._index_ids = {id(p) for name, p in parameters if is_index_parameter(name)}
        self.adamw = TiledAdamW(
            self._adamw_groups(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            moments_dtype=optim.moments_dtype,
            offload=optim.offload,
            copies=copies,
        )
        self.muon: torch.optim.Muon | None = None
        if self._pieces:
            self.muon = torch.optim.Muon(self._muon_groups(), lr=optim.muon_lr, momentum=optim.muon_momentum)

    def _adamw_groups(self) -> list[dict[str, Any]]:
        """Group matrices with weight decay and the rest without, of the backbone and of the index branch."""
        # vectors are norms and biases, which as usual do not decay
        rest = [p for p in self._parameters if id(p) not in self._pieces]
        return [
            {
                "params": [
                    p for p in rest if (p.dim() > 1) is matrix and (id(p) in self._index_ids) is index
                ],
                "weight_decay": self._weight_decay(index) if matrix else 0.0,
                "index": index,
            }
            for index in (False, True)
            for matrix in (True, False)
        ]

    def _muon_groups(self) -> list[dict[str, Any]]:
        """Group Muon's pieces: the backbone's and the index branch's."""
        groups = []
        for index in (False, True):
            owners = [i for i in self._pieces if (i in self._index_ids) is index]
            pieces = [piece for i in owners for piece in self._pieces[i]]
            # torch decays by the group's rate times this, at the peak 0.02 x 0.1 where AdamW has 3e-4 x 0.1
            if pieces:
                groups.append({"params": pieces, "weight_decay": self._weight_decay(index), "index": index})
        return groups

    def _weight_decay(self, index: bool) -> float:
        """Return the weight decay of the index branch or of the backbone."""
        return self.optim.index_weight_decay if index else self.optim.weight_decay

    def _is_muon(self, name: str, parameter: Tensor) -> bool:
        """Tell whether Muon takes it: a matrix in a layer, but no router, whose rows are one per expert."""
        if self.optim.algorithm is not OptimizerKind.muon:
            return False
        return parameter.dim() == 2 and name.startswith("decoder.layers.") and ".router." not in name

    def step(self, rates: LearningRates, *, gradient_factor: float = 1.0) -> None:
        """Update from the gradients that `set_gradient` handed over, which GradBuffers has summed.

        Example: lr=3e-4 and muon_lr=0.02; where the schedule gives AdamW 1.5e-4, Muon's rate is 0.01.

        Args:
            rates: learning rates.
            gradient_factor: for clipping gradients in bf16; others are clipped already.
        """
        self.adamw.gradient_factor = gradient_factor
        for group in self.adamw.param_groups:
            group["lr"] = rates.index if group["index"] else rates.backbone
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                rate = rates.index if group["index"] else rates.backbone
                # rate / lr is the schedule's share of the peak, with the factors of stage and index branch
                group["lr"] = self.optim.muon_lr * rate / self.optim.lr
            for parameter in self._parameters:
                self._hand_gradient_to_pieces(parameter)
            self.muon.step()

    def _hand_gradient_to_pieces(self, parameter: nn.Parameter) -> None:
        """Give each piece its rows of the parameter's gradient; none where the parameter has none."""
        pieces = self._pieces.get(id(parameter), [])
        gradients = [None] * len(pieces)
        if pieces and parameter.grad is not None:
            gradients = parameter.grad.split(pieces[0].shape[0])
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.grad = gradient

    def moments(self, parameter: nn.Parameter, *, loading: bool = False) -> tuple[Tensor, Tensor]:
        """Return first and second moment, shaped like the parameter; zero before the first step.

        Muon's momentum is a running mean of gradients like AdamW's first moment and takes its place; it has
        no second one; both are made here. Moments in fp8 get their fp32 values when a checkpoint copies them.

        Args:
            parameter: one of those to update.
            loading: to be read into, for `load_moments`.
        """
        if id(parameter) not in self._pieces:
            state = self.adamw.moments_of(parameter)
            first, second = (stored(state[name], loading=loading) for name in ("exp_avg", "exp_avg_sq"))
            return first, second
        # buffer = momentum * buffer + (1 - momentum) * gradient, as exp_avg with beta1
        momentum = torch.cat([buffer for _, buffer in self._momenta(parameter)])
        return momentum, torch.zeros_like(parameter)

    def load_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor, step: int) -> None:
        """Take over what `moments` gave after `step` updates.

        AdamW's correction of young moments needs the count; Muon has none.
        """
        if id(parameter) in self._pieces:
            momenta = self._momenta(parameter)
            parts = first.split(momenta[0][0].shape[0])
            for (_, buffer), part in zip(momenta, parts, strict=True):
                buffer.copy_(part)
            return
        state = self.adamw.moments_of(parameter)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        state["step"].fill_(float(step))

    def _momenta(self, parameter: nn.Parameter) -> list[tuple[nn.Parameter, Tensor]]:
        """List Muon's pieces of a parameter with the momentum of each, made where there was no step yet."""
        assert self.muon is not None, "it was built for these parameters"
        result = []
        for piece in self._pieces[id(parameter)]:
            state = self.muon.state[piece]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(piece)
            result.append((piece, state["momentum_buffer"]))
        return result


def _pieces(name: str, parameter: nn.Parameter, head_dim: int) -> list[nn.Parameter]:
    """Cut a parameter into what Muon makes orthogonal on its own, views of whole rows.

    Example: a linear_qkv.weight of [12, 5] with head_dim 2 -> six pieces of [2, 5].

    The gradients of values are much larger than those of queries and keys: in one matrix with them, queries
    and keys would hardly move. Megatron's fused projection holds heads one after another.
    """
    rows = head_dim if name.endswith("linear_qkv.weight") else parameter.shape[0]
    return [nn.Parameter(piece) for piece in parameter.detach().split(rows)]
