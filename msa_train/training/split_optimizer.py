"""torch.optim for engine=torch: AdamW for everything, or Muon for the layers' matrices and AdamW beside it.

Every rank holds whole matrices (dense ones replicated, experts its own), so Muon needs no communication.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msa_train.config import OptimConfig, OptimizerKind


class SplitOptimizer:
    """One or two torch optimizers behind one step, with moments under AdamW's names."""

    def __init__(self, optim: OptimConfig, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """parameters: names in the model and what is updated (fp32 copies of 16-bit parameters)."""
        self.optim = optim
        matrices = [p for name, p in parameters if self._is_muon(name, p)]
        self._by_muon = {id(p) for p in matrices}
        rest = [p for _, p in parameters if id(p) not in self._by_muon]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() > 1], "weight_decay": optim.weight_decay},
                {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            foreach=True,
        )
        self.muon: torch.optim.Muon | None = None
        if matrices:
            self.muon = torch.optim.Muon(
                matrices, lr=optim.muon_lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay
            )

    def _is_muon(self, name: str, parameter: Tensor) -> bool:
        """Matrices inside layers; a router's rows are one per expert and stay with AdamW."""
        if self.optim.algorithm is not OptimizerKind.muon:
            return False
        return parameter.dim() == 2 and name.startswith("decoder.layers.") and ".router." not in name

    def step(self, lr: float) -> None:
        """Update from `.grad`; lr is the schedule's value for AdamW, Muon's follows in proportion."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = self.optim.muon_lr * lr / self.optim.lr
            self.muon.step()

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """First and second moment, shaped like the parameter; zero before the first step.

        Muon's momentum is a running mean of gradients like AdamW's first moment and takes its place; it has
        no second one.
        """
        state = self._state(parameter)
        if id(parameter) in self._by_muon:
            return state["momentum_buffer"], torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]

    def load_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor, step: int) -> None:
        """Take over what `moments` gave after `step` updates."""
        state = self._state(parameter)
        if id(parameter) in self._by_muon:
            state["momentum_buffer"].copy_(first)
            return
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        state["step"].fill_(float(step))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if id(parameter) in self._by_muon:
            assert self.muon is not None, "it was built for these parameters"
            state = self.muon.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            return state
        state = self.adamw.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
