"""No setting and no option takes a number that is not finite, whatever its name."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from launchers import checkpoint, simulate
from launchers.hydra_config.compose import compose_run
from launchers.local.launch_checks import plan_layout
from msa_train.checkpoint.torch_dist.finite_state import listed, not_finite
from msa_train.config import ClusterConfig, RunConfig, StageConfig, check_cluster
from msa_train.config.rules.numbers import check_finite_numbers


def with_value(config: Any, path: list[str], value: float) -> Any:
    """A copy in which one field, reached through other fields and keys, is another number."""
    name, *rest = path
    if isinstance(config, dict):
        return config | {name: with_value(config[name], rest, value)}
    return replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def floats(config: Any) -> Iterator[list[str]]:
    entries = (
        config.items()
        if isinstance(config, dict)
        else ((f.name, getattr(config, f.name)) for f in fields(config))
    )
    for name, value in entries:
        if is_dataclass(value) or isinstance(value, dict):
            yield from ([name, *rest] for rest in floats(value))
        elif isinstance(value, float):
            yield [name]


CONFIG = RunConfig(stages={"only": StageConfig()})
NAMES = {".".join(path): path for path in floats(CONFIG)}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_must_be_finite(name: str) -> None:
    check_finite_numbers(CONFIG)
    for value in (math.nan, math.inf, -math.inf):
        try:
            config = with_value(CONFIG, NAMES[name], value)
        except ValueError:
            # a rule of the section itself
            continue
        with pytest.raises(ValueError, match=rf"^{name}={value}: must be a finite number; use {name}="):
            check_finite_numbers(config)


def test_all_sections_are_looked_at() -> None:
    assert len(NAMES) > 20
    assert {"optim.weight_decay", "attention.kl_temperature", "stages.only.lr_scale"} <= NAMES.keys()


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", ".nan", "1e400"])
def test_commands_refuse_them(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^optim\.weight_decay="):
        plan_layout(compose_run(["run=demo", "launcher.device=cpu", f"optim.weight_decay={text}"]))
    if not text.startswith("."):
        assert checkpoint.main(["diff", "a", "b", f"--tolerance={text}"]) == 2
        assert "--tolerance" in capsys.readouterr().err
        assert simulate.main(["run", "--seq-len", "1024", "--cp-size", "4", f"--f={text}"]) == 2


def test_cluster_settings_are_finite() -> None:
    with pytest.raises(ValueError, match=r"^cluster\.min_memory_gb=nan: must be a finite number"):
        check_cluster(ClusterConfig(min_memory_gb=math.nan))


@pytest.mark.parametrize("value", ["0", "0.0", "1e-50", "-1e-8"])
def test_eps_is_more_than_nothing_in_fp32(value: str) -> None:
    with pytest.raises(
        ValueError, match=r"^optim\.eps=\S+: must be at least 1\.2e-38, .*; use optim\.eps=1e-8$"
    ):
        plan_layout(compose_run(["run=demo", "launcher.device=cpu", f"optim.eps={value}"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_looked_through_to_the_last_number(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensors = {
        "sound": torch.tensor([-largest, 0.0, largest], dtype=dtype),
        "empty": torch.ones(0, dtype=dtype),
        "whole": torch.ones(2, dtype=torch.int64),
        "true": torch.ones(2, dtype=torch.bool),
        "scalar": torch.tensor(1.0, dtype=dtype),
    }
    assert not_finite(tensors.items()) == set()
    for value in (math.nan, math.inf, -math.inf):
        bad = torch.ones(3, 5, dtype=dtype)
        bad[-1, -1] = value
        some = {f"bad{i}": bad for i in range(5)} | {"t": bad.t(), "scalar": torch.tensor(value, dtype=dtype)}
        found = not_finite((tensors | some).items())
        assert found == some.keys()
        assert listed([found, set(), {"a"}]) == "a, bad0, bad1 and 5 more"
