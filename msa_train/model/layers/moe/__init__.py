"""Mixture of experts on any device: router, dispatch, experts by grouped products, tiles over the sequence.

router.py        scores to experts, padding to none
routing.py       where tokens go, known on the host by one wait a layer; recorded, then replayed
rows.py          tokens to rows and back, and rows between ranks, without a wait
experts.py       the experts of this rank, by one grouped product instead of one product each
dispatch.py      the same steps for autograd, for a layer without tiles
tiles.py         forward and backward tile by tile, messages under computing
deepep.py        rows sent by DeepEP instead, where that is asked for
gradient_sums.py weight gradients added up over tiles
layer.py         Megatron's MoE layer out of these
feed_forward.py  the dense feed-forward layer, tiled too
"""

from msa_train.model.layers.moe.layer import ExpertLayer
from msa_train.model.layers.moe.router import SigmoidRouter

__all__ = ["ExpertLayer", "SigmoidRouter"]
