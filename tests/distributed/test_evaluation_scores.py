"""Teacher-forced scores: those of plain logits, the same however samples are packed and ranks share them."""

import random
from typing import Any

import numpy as np
import torch

from msa_train.evaluation.scoring.engine import observed
from msa_train.evaluation.scoring.needle_rate import NeedleRate
from msa_train.evaluation.scoring.packs import document_of, pack_documents
from msa_train.evaluation.scoring.samples import score_samples
from msa_train.evaluation.shared_samples import own_indices, share_samples
from msa_train.evaluation.tasks.sample import Needle, Sample
from msa_train.evaluation.undisturbed import undisturbed
from msa_train.model.gpt import forward_arguments
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from tests.helpers.devices import rank_device
from tests.helpers.model_runs import BLOCK_SIZE, SEQ_LEN, VOCAB, small_config
from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.spawn import run_ranks

LENGTHS = (90, 30, 17, 44, 61, 8, 96)


def made_samples() -> list[Sample]:
    """Random tokens with two answers each and a needle for either."""
    rng = random.Random(7)
    samples = []
    for index, length in enumerate(LENGTHS):
        middle = length // 2
        samples.append(
            Sample(
                task="made",
                length=length,
                index=index,
                prompt="",
                prefix="",
                references=("a", "b"),
                tokens=np.array([rng.randrange(1, VOCAB) for _ in range(length)]),
                answers=((middle, middle + 1), (middle + 1, length)),
                needles=(Needle(0, 3, 0), Needle(length // 2 - 3, length // 2 - 1, 1)),
                depth=None,
                ordered=True,
            )
        )
    return samples


def scores(_rank: int, _world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a layout makes of the samples."""
    config = small_config(**settings)
    groups = build_groups(config.parallel, device=rank_device())
    engine = TorchEngine(config, groups)
    every = made_samples()
    own = [every[index] for index in own_indices(len(every), groups)]
    samples = share_samples(own, len(every), groups)
    rate = NeedleRate(config, groups, samples)
    with undisturbed(engine):
        found = score_samples(engine, samples, needle_rate=rate if NeedleRate.is_measured(engine) else None)
    return {
        "scores": [(one.num_tokens, one.num_correct, one.nll) for one in found],
        "rates": rate.rates(),
        "left": (engine.chunks[-1].observer, engine.forward.open_selections),
    }


def plain(_rank: int, _world_size: int) -> list[tuple[int, int, float]]:
    """Each sample alone, from all logits."""
    config = small_config()
    groups = build_groups(config.parallel, device=rank_device())
    engine = TorchEngine(config, groups)
    engine.model.eval()
    found = []
    for sample in made_samples():
        (packed,) = pack_documents([document_of(sample)], num_tokens=SEQ_LEN, block_size=BLOCK_SIZE)
        with torch.no_grad():
            params = engine.forward.prepare(
                packed.pack, num_tokens=1, comm=groups.cp_comm(), stats=LayerStats()
            )
            pack = params.context.pack
            logits = engine.model(**forward_arguments(pack.tokens, None), packed_seq_params=params)
        logits = logits.reshape(SEQ_LEN, VOCAB)
        start, stop = sample.answers[0][0], len(sample.tokens)
        rows = logits[start - 1 : stop - 1]
        labels = torch.from_numpy(sample.tokens[start:stop])
        loss = torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
        found.append((stop - start, int((rows.argmax(1) == labels).sum()), float(loss)))
    return found


def test_scores_are_the_same_in_every_layout() -> None:
    (reference,) = run_ranks(1, plain)
    assert sum(one[1] for one in reference) > 0, "some tokens are hit by chance, so hits are compared too"
    (alone,) = run_ranks(1, scores, {})
    for settings in ({"cp_size": 2}, {"ep_size": 2}):
        for rank in run_ranks(2, scores, settings):
            assert rank["left"] == (None, None)
            for one, other, expected in zip(rank["scores"], alone["scores"], reference, strict=True):
                assert one[:2] == other[:2] == expected[:2]
                assert abs(one[2] - expected[2]) < 1e-9
                assert abs(other[2] - expected[2]) < 1e-9
            assert rank["rates"].keys() == alone["rates"].keys() == {"layer02", "layer04"}
            for layer, rates in rank["rates"].items():
                np.testing.assert_allclose(rates, alone["rates"][layer], rtol=0, atol=1e-12)
    assert all(len(rates) == 3 for rates in alone["rates"].values())
    shares = [share for rates in alone["rates"].values() for share in rates]
    assert 0 < min(shares) < max(shares) < 1


@needs_pretended_gpu
def test_scores_on_a_device() -> None:
    """What is on the host and what on the device is not mixed; NCCL's rules are kept."""
    (alone,) = run_ranks(1, scores, {})
    for rank in run_ranks(2, scores, {"cp_size": 2}, device="pretended"):
        for one, other in zip(rank["scores"], alone["scores"], strict=True):
            assert one[:2] == other[:2]
            assert abs(one[2] - other[2]) < 1e-9
        for layer, rates in rank["rates"].items():
            np.testing.assert_allclose(rates, alone["rates"][layer], rtol=0, atol=1e-12)


def refuses_gradients(_rank: int, _world_size: int) -> str:
    config = small_config()
    engine = TorchEngine(config, build_groups(config.parallel, device=rank_device()))
    try:
        with observed(engine, predicts=True):
            raise RuntimeError("broken off")
    except RuntimeError:
        return str(engine.model.observer)


def test_observer_is_taken_away_again() -> None:
    assert run_ranks(1, refuses_gradients) == ["None"]
