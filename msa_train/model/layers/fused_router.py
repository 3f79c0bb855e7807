"""Turn router logits into the probabilities of chosen experts in one pass over memory each way.

Experts are chosen by torch's own operators, so the selection is the plain router's bit for bit. Compiled are
the scores of the chosen ones, their normalisation and scaling, and the whole way back: plain operators also
spread probabilities and selection over all experts, and gather and scatter their gradients.

Kept for the backward pass are the scores and numbers of the chosen experts: 12 bytes for each in fp32, in M3
48 bytes a token where plain autograd keeps about 1,100 (128 fp32 scores, 128 booleans and 4 of each chosen
one; arithmetic).

Shapes: t tokens, E experts, k of them chosen.
"""

from typing import Any

import torch
from torch import Tensor

from msa_train.model.layers.fusion import fused

# as Megatron has it: scores that are all 0 give probabilities of 0
_TINY = 1e-20


def best_experts(logits: Tensor, bias: Tensor | None, topk: int) -> Tensor:
    """Choose experts by score plus bias, the best first: logits [t, E], bias [E] -> [t, k] int64."""
    with torch.no_grad():
        scores = torch.sigmoid(logits)
        return torch.topk(scores if bias is None else scores + bias, topk, dim=1).indices


def fused_probs(logits: Tensor, chosen: Tensor, scaling: float) -> Tensor:
    """Compute probabilities of the chosen experts: logits [t, E], chosen [t, k] int64 -> [t, k].

    Args:
        logits: fp32 or fp64, which the result has too.
        chosen: experts of each token, all different.
        scaling: their sum.
    """
    return _Probs.apply(logits, chosen, scaling)  # type: ignore[return-value]


class _Probs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor, scaling: float) -> Tensor:
        probs, scores = _probs(logits, chosen, scaling)
        ctx.save_for_backward(scores, chosen)
        ctx.scaling, ctx.num_experts = scaling, logits.shape[1]
        return probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, chosen = ctx.saved_tensors
        return _probs_grad(grad, scores, chosen, ctx.scaling, ctx.num_experts), None, None


@fused
def _probs(logits: Tensor, chosen: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.gather(1, chosen))
    # one expert alone is not normalised
    total = scores.sum(-1, keepdim=True) + _TINY if chosen.shape[1] > 1 else 1.0
    return scores / total * scaling, scores


@fused
def _probs_grad(grad: Tensor, scores: Tensor, chosen: Tensor, scaling: float, num_experts: int) -> Tensor:
    grad = grad * scaling
    if chosen.shape[1] > 1:
        total = scores.sum(-1, keepdim=True) + _TINY
        grad = (grad - (grad * scores).sum(-1, keepdim=True) / total) / total
    of_chosen = grad * scores * (1 - scores)
    # by comparing, not scattering: one kernel, whose sums have at most one number that is not 0
    experts = torch.arange(num_experts, device=chosen.device)
    return (of_chosen.unsqueeze(-1) * (chosen.unsqueeze(-1) == experts)).sum(1)
