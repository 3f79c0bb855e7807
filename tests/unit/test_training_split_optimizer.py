"""The two optimizers behind one step, and their moments through a save and load."""

import pytest
import torch
from torch import nn

from msa_train.config import OptimConfig, OptimizerKind
from msa_train.training.optim.lr_schedule import LearningRates
from msa_train.training.optim.muon_adamw import MuonAdamW

HEAD_DIM = 2
NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.mlp.router.weight",
    "decoder.layers.0.input_layernorm.weight",
]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (8, 4), (3, 4), (4,)]
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in zip(NAMES, shapes, strict=True)
    ]


def set_gradients(named: list[tuple[str, nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_layers_only() -> None:
    named = parameters()
    optimizer = MuonAdamW(OptimConfig(algorithm=OptimizerKind.muon), named, head_dim=HEAD_DIM)
    assert optimizer.muon is not None
    pieces = optimizer.muon.param_groups[0]["params"]
    assert [piece.shape for piece in pieces] == [(HEAD_DIM, 4)] * 4
    assert pieces[1].data_ptr() == named[1][1][HEAD_DIM:].data_ptr()
    assert MuonAdamW(OptimConfig(), named, head_dim=HEAD_DIM).muon is None


def test_muon_moves_every_head_alike() -> None:
    """One step moves each head by lr in every direction, roughly, however unequal their gradients are."""
    named = parameters()
    before = named[1][1].detach().clone()
    optimizer = MuonAdamW(
        OptimConfig(algorithm=OptimizerKind.muon, lr=1e-3, muon_lr=0.1, weight_decay=0.0),
        named,
        head_dim=HEAD_DIM,
    )
    set_gradients(named, 1)
    assert named[1][1].grad is not None
    named[1][1].grad[:HEAD_DIM] *= 1e-3
    optimizer.step(LearningRates(5e-4, 5e-4))
    moved = torch.linalg.svdvals((named[1][1].detach() - before).view(-1, HEAD_DIM, 4))
    expected = 0.1 * 0.5
    assert ((moved > 0.6 * expected) & (moved < 1.4 * expected)).all()


@pytest.mark.parametrize("algorithm", OptimizerKind)
def test_goes_on_bit_for_bit_after_loading(algorithm: OptimizerKind) -> None:
    optim = OptimConfig(algorithm=algorithm)
    named, copies = parameters(), parameters()
    first, second = (MuonAdamW(optim, each, head_dim=HEAD_DIM) for each in (named, copies))
    for seed in (1, 2):
        set_gradients(named, seed)
        first.step(LearningRates(1e-3, 1e-3))
    for (_, source), (_, target) in zip(named, copies, strict=True):
        target.data.copy_(source.data)
        second.load_moments(target, *first.moments(source), step=2)
    for optimizer, tensors in ((first, named), (second, copies)):
        set_gradients(tensors, 3)
        optimizer.step(LearningRates(1e-3, 1e-3))
    for (_, source), (_, target) in zip(named, copies, strict=True):
        assert torch.equal(source, target)
