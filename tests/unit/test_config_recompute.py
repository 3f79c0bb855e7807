"""What each pipeline rank recomputes, and which words are refused."""

import pytest

from msa_train.config import ParallelConfig, Recompute, RunConfig, TrainConfig
from msa_train.config.recompute import recompute_modules, replays_attention, stage_recomputes
from msa_train.config.rules.recompute import check_recompute

NONE, SELECTIVE, FULL = Recompute.none, Recompute.selective, Recompute.full


def config_of(pp_size: int = 1, **train: object) -> RunConfig:
    return RunConfig(parallel=ParallelConfig(pp_size=pp_size), train=TrainConfig(**train))  # type: ignore[arg-type]


def test_stages() -> None:
    assert stage_recomputes(config_of(3, recompute=FULL)) == (FULL, FULL, FULL)
    mixed = config_of(4, recompute=FULL, recompute_stages="full, selective,none,none")
    check_recompute(mixed)
    assert stage_recomputes(mixed) == (FULL, SELECTIVE, NONE, NONE)
    assert recompute_modules(config_of(recompute_modules=" norm,attention,")) == {"norm", "attention"}


def test_share_of_ranks_that_exchange_twice() -> None:
    stages = "full,selective,none,none"
    assert replays_attention(config_of()) == 0
    assert replays_attention(config_of(recompute=FULL)) == 1
    assert replays_attention(config_of(4, recompute_stages=stages)) == 0.25
    assert replays_attention(config_of(4, recompute_stages=stages, recompute_modules="attention")) == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute_stages": "full"}, "has 1 words for parallel.pp_size=2"),
        ({"recompute_stages": "full,some"}, "must be words out of none, selective, full"),
        ({"recompute_modules": "experts,mlp"}, "'mlp' is not one of attention, experts, ffn, norm"),
        ({"recompute": SELECTIVE, "recompute_modules": " "}, "names nothing for train.recompute=selective"),
    ],
)
def test_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match="use ") as error:
        check_recompute(config_of(2, **settings))
    assert str(error.value).startswith(f"train.{list(settings)[-1]}=")
    assert words in str(error.value)
