"""Absurd sizes are refused by a line, before they cost memory or time."""

import contextlib
from dataclasses import fields, is_dataclass, replace

import pytest

from launchers import train
from launchers.hydra_config.compose import compose_run, known_keys
from launchers.local.memory import check_memory, least_bytes
from launchers.submit import main as submit
from msa_train.config import (
    ClusterConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    check_cluster,
    check_rules,
    check_time,
)
from msa_train.config.rules.limits import COUNT, LIMITS

INTS = [key for key, kind in known_keys(["main"]).items() if kind is int]
HUGE = 10**9
# arguments, what the line names, the rule
ABSURD = [
    ("model.num_layers=1000000000", "model.num_layers=1000000000", "at most 10000"),
    ("model.layer_attention=full*0", "model.layer_attention=full*0", "'*count' from 1 on"),
    ("model.layer_attention=full*999999999", "model.layer_attention=full*999999999", "names more layers"),
    (f"model.layer_attention=full*{10**30}", "model.layer_attention=full*1", "optional '*count'"),
    ("train.global_batch_size=9223372036854775808", "train.global_batch_size=9223372036854775808", "at most"),
    (f"train.steps={'9' * 100}", "train.steps=a number of more than 30 digits", "at most 2147483647"),
    ("launcher.timeout_s=2000001", "launcher.timeout_s=2000001", "at most 2000000"),
    ("launcher.num_processes=100000", "launcher.num_processes=100000", "at most 4096"),
    ("data.seq_len=134217728 attention.block_size=1", "data.seq_len=134217728", "at most 4194304 blocks"),
    ("model.hidden_size=1048576", "model=smoke", "GB of memory"),
    ("train.global_batch_size=16777216", "train.global_batch_size=16777216", "GB of memory"),
    ("data.seq_len=134217728 attention.block_size=64", "data.seq_len=134217728", "GB of memory"),
]


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: 0)
    monkeypatch.setattr("launchers.local.memory.machine_memory", lambda: 16 * 10**9)


@pytest.fixture(scope="module")
def smoke() -> RunConfig:
    return compose_run(["run=smoke"])


def with_value(config: RunConfig, key: str, value: int) -> RunConfig:
    """A copy in which one number is another; rules of the parts are not asked."""
    changed = replace(config, stages={"main": StageConfig()})
    parts = key.split(".")
    part: object = changed
    for name in parts[:-1]:
        if isinstance(part, dict):
            part = part[name]
            continue
        inner = getattr(part, name)
        if is_dataclass(inner):
            copy = object.__new__(type(inner))
            for item in fields(inner):
                object.__setattr__(copy, item.name, getattr(inner, item.name))
            setattr(part, name, copy)
            inner = copy
        part = inner
    setattr(part, parts[-1], value)
    return changed


@pytest.mark.parametrize(("arguments", "names", "rule"), ABSURD, ids=lambda value: value[:40])
def test_one_line_before_anything_is_done(
    arguments: str, names: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["run=smoke", *arguments.split(), "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"msa-train: error: {names}")
    assert captured.err.count("\n") == 1
    assert rule in captured.err


@pytest.mark.parametrize("key", INTS)
def test_every_whole_number_has_a_limit(key: str, smoke: RunConfig) -> None:
    for value in (2**63, -(2**63), 10**5000):
        with pytest.raises(ValueError, match=rf"^{key}="):
            check_rules(with_value(smoke, key, value), world_size=2, has_gpu=False)
    # what a limit lets through is dealt with by the other rules, or by none
    limit = LIMITS.get(key.replace("stages.main", "stages"), COUNT)
    with contextlib.suppress(ValueError):
        check_rules(with_value(smoke, key, limit), world_size=2, has_gpu=False)


def test_limits_are_of_keys_that_exist() -> None:
    assert {key.replace("stages.", "stages.main.") for key in LIMITS} <= set(INTS)


def test_sizes_that_are_trained_are_far_from_the_limits() -> None:
    for run, world_size in (("m2_32k", 128), ("m3_200k", 128), ("m3_1m", 256)):
        check_rules(compose_run([f"run={run}"]), world_size=world_size, has_gpu=True)


def test_divisors_of_a_large_job_are_found_soon(smoke: RunConfig) -> None:
    config = with_value(smoke, "parallel.ep_size", 7)
    config.model = replace(config.model, num_experts=7)
    with pytest.raises(ValueError, match=r"use one of 1, 2, 4, .*, 8388608000"):
        check_rules(config, world_size=2**23 * 1000, has_gpu=False)


def test_a_layer_count_is_refused_before_the_layers_are_listed() -> None:
    with pytest.raises(ValueError, match="at most 10000"):
        ModelConfig(num_layers=HUGE)
    assert len(ModelConfig(num_layers=4, layer_attention="full*03,msa").attention_kinds()) == 4


def test_memory_is_a_lower_bound(smoke: RunConfig) -> None:
    needs = least_bytes(smoke, 2)
    assert 0 < sum(needs.values()) < 100e6
    check_memory(smoke, 2, machine_bytes=100 * 10**6)
    check_memory(smoke, 2, machine_bytes=0)
    large = compose_run(["run=demo", "model=m3", "attention=msa"])
    with pytest.raises(ValueError, match=r"^model=m3: 2 workers need at least 7,\d\d\d GB"):
        check_memory(large, 2, machine_bytes=10**12)


def test_sizes_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gpus_per_node", "cpus_per_worker", "signal_lead_s", "max_restarts", "workers_per_node"):
        with pytest.raises(ValueError, match=rf"^cluster\.{name}={10**12}: must be at most"):
            check_cluster(replace(ClusterConfig(), **{name: 10**12}))
    for time in ("9999-00", "99999-00", "9" * 5000, "٣"):
        with pytest.raises(ValueError, match=f"^time={time}: must be"):
            check_time(time, ClusterConfig())
    for nodes in ("100000", "9" * 5000, "٣"):
        assert submit(["run=smoke", "cluster=local_cpu", f"nodes={nodes}", "--dry-run"]) == 2
        assert "must be a number of nodes from 1 to 99999" in capsys.readouterr().err
