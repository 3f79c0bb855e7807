"""engine=deepspeed: its rules, and the JSON that follows from a run."""

import errno
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers.hydra_config.compose import compose_run
from launchers.local import engine_checks
from msa_train.config import RunConfig, check_rules, contradictions
from msa_train.config.deepspeed.async_io import async_io_file
from msa_train.config.deepspeed.raw import check_raw
from msa_train.config.deepspeed.to_json import deepspeed_json
from msa_train.config.model_size import model_size


def composed(*overrides: str) -> RunConfig:
    return compose_run(["run=smoke", "engine=deepspeed", *overrides])


def check(*overrides: str) -> None:
    check_rules(composed(*overrides), world_size=2, has_gpu=False)


@pytest.mark.parametrize(
    ("overrides", "name", "fix"),
    [
        (["deepspeed=zero3"], "parallel.ep_size=2", "use deepspeed.zero_stage=2, parallel.ep_size=1"),
        (["parallel.tp_size=2", "parallel.cp_size=1"], "parallel.tp_size=2", "engine=megatron"),
        (
            ["parallel.pp_size=2", "parallel.cp_size=1", "parallel.ep_size=1"],
            "parallel.pp_size=2",
            "engine=megatron",
        ),
        (
            ["parallel.overlap_grad_reduce=true"],
            "parallel.overlap_grad_reduce=true",
            "deepspeed.overlap_comm",
        ),
        (["optim.algorithm=muon"], "optim.algorithm=muon", "optim.algorithm=adamw"),
        (["optim.moments_dtype=bf16"], "optim.moments_dtype=bf16", "optim.moments_dtype=fp32"),
        (
            ["train.precision=bf16", "optim.grads_dtype=bf16"],
            "optim.grads_dtype=bf16",
            "optim.grads_dtype=fp32",
        ),
        (["optim.offload=0.5"], "optim.offload=0.5", "deepspeed.offload_optimizer=cpu"),
        (["train.precision=fp64"], "train.precision=fp64", "engine=torch"),
        (["train.precision=bf16", "deepspeed.zero_stage=0"], "deepspeed.zero_stage=0", "zero_stage=1"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage=4", "from 0 to 3"),
        (["deepspeed.zero_stage=-1"], "deepspeed.zero_stage=-1", "from 0 to 3"),
        (["deepspeed.offload_param=cpu"], "deepspeed.offload_param=cpu", "deepspeed.zero_stage=3"),
        (
            ["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=cpu"],
            "deepspeed.offload_optimizer=cpu",
            "deepspeed.zero_stage=1",
        ),
        (["deepspeed.offload_optimizer=nvme"], "deepspeed.offload_optimizer=nvme", "deepspeed.zero_stage=3"),
        (
            ["deepspeed=zero3", "parallel.ep_size=1", "deepspeed.offload_optimizer=nvme"],
            "deepspeed.nvme_path=",
            "deepspeed.nvme_path=/local_nvme",
        ),
        (["deepspeed=zero3_nvme", "parallel.ep_size=1"], "deepspeed.nvme_path=", "a folder on a local disk"),
        (["deepspeed.reduce_bucket_size=0"], "deepspeed.reduce_bucket_size=0", "at least 1"),
        (["deepspeed.allgather_bucket_size=7"], "deepspeed.allgather_bucket_size=7", "_size=8"),
        (["deepspeed.param_persistence_threshold=-1"], "deepspeed.param_persistence_threshold=-1", "use 0"),
        (["deepspeed.raw.train_batch_size=4"], "deepspeed.raw.train_batch_size=4", "global_batch_size"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Sequence[str], name: str, fix: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(*overrides)
    text = str(refused.value)
    assert text.startswith(f"{name}: ")
    assert fix in text
    assert "\n" not in text


@pytest.mark.parametrize("overrides", [[], ["deepspeed=zero1"], ["deepspeed=zero2_offload"]])
def test_shipped_options_are_accepted(overrides: Sequence[str]) -> None:
    check(*overrides)
    check("deepspeed=zero3_offload", "parallel.ep_size=1")
    check("deepspeed=zero3_nvme", "parallel.ep_size=1", "deepspeed.nvme_path=/disk")


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("gradient_accumulation_steps", "train.global_batch_size"),
        ("gradient_clipping", "optim.clip_grad"),
        ("bf16.enabled", "train.precision"),
        ("fp16.enabled", "train.precision"),
        ("optimizer.type", "optim."),
        ("scheduler.type", "optim."),
        ("zero_optimization.stage", "deepspeed.zero_stage"),
        ("zero_optimization.zero_quantized_gradients", "leave it out"),
        ("sequence_parallel_size", "parallel.cp_size"),
        ("mesh_param", "parallel.cp_size"),
        ("zero_optimization.sequence_parallel_size", "parallel.cp_size"),
        ("tiled_mlp.shards", "train.tile_tokens"),
        ("alst.tiled_logits", "train.tile_tokens"),
        ("pipeline.stages", "parallel.pp_size"),
        ("tensor_parallel.autotp_size", "parallel.tp_size"),
        ("compile.deepcompile", "leave it out"),
        ("zero_optimisation.sub_group_size", "zero_optimization"),
    ],
)
def test_raw_contradicts_nothing(key: str, fix: str) -> None:
    raw: object = 1
    for name in reversed(key.split(".")):
        raw = {name: raw}
    with pytest.raises(ValueError) as refused:
        check_raw(raw)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"deepspeed.raw.{key}=1: ")
    assert fix in str(refused.value)


def test_raw_is_merged_in_last_and_deep() -> None:
    """By one value or by a mapping, on the command line."""
    for text in (
        "deepspeed.raw.zero_optimization.sub_group_size=12",
        "deepspeed.raw={zero_optimization:{sub_group_size:12}}",
    ):
        config = composed("deepspeed.zero_stage=1", text, "deepspeed.raw.dump_state=true")
        check_rules(config, world_size=2, has_gpu=False)
        made = deepspeed_json(config)
        assert made["zero_optimization"]["sub_group_size"] == 12
        assert made["zero_optimization"]["stage"] == 1
        assert made["dump_state"] is True


def test_json_neither_clips_nor_divides() -> None:
    for overrides in (["deepspeed=zero1"], ["deepspeed=zero2"], ["train.precision=bf16"]):
        made = deepspeed_json(composed(*overrides))
        assert made["gradient_clipping"] == 0.0
        assert made["gradient_accumulation_steps"] == 1
        assert made["gradient_allreduce_op"] == "sum"
        assert made["communication_data_type"] == "fp32"
        assert made["data_types"]["grad_accum_dtype"] == "fp32"
        assert json.loads(json.dumps(made, allow_nan=False)) == made
    # ZeRO-3 has no sum
    assert "gradient_allreduce_op" not in deepspeed_json(composed("deepspeed=zero3"))
    assert deepspeed_json(composed("train.precision=bf16"))["bf16"] == {
        "enabled": True,
        "check_grad_overflow": False,
        "immediate_grad_update": True,
    }


def test_json_says_where_states_are() -> None:
    made = deepspeed_json(
        composed(
            "deepspeed=zero3",
            "deepspeed.offload_optimizer=nvme",
            "deepspeed.offload_param=cpu",
            "deepspeed.nvme_path=/disk",
        )
    )["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk", "buffer_count": 3}
    assert made["offload_param"] == {"device": "cpu"}
    # files are few and buffers small
    assert made["sub_group_size"] == 50_000_000
    assert "sub_group_size" not in deepspeed_json(composed("deepspeed=zero3_offload"))["zero_optimization"]
    made = deepspeed_json(composed("deepspeed=zero3_nvme", "deepspeed.nvme_path=/disk"))["zero_optimization"]
    assert made["offload_param"] == {"device": "nvme", "nvme_path": "/disk", "max_in_cpu": 0}
    assert made["stage3_max_reuse_distance"] == 0


def test_settings_without_effect_are_named() -> None:
    config = compose_run(["run=smoke", "engine=torch", "deepspeed=zero3"])
    assert any("does not look at deepspeed.*" in line for line in contradictions(config))
    assert not any("deepspeed" in line for line in contradictions(compose_run(["run=smoke"])))


def test_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"engine=deepspeed: the deepspeed package is not installed; install"
    ):
        engine_checks.check_deepspeed_here(composed(), 2)
    engine_checks.check_deepspeed_here(compose_run(["run=smoke"]), 2)


def in_files(folder: object, *overrides: str) -> RunConfig:
    return composed("deepspeed=zero3_nvme", "parallel.ep_size=1", f"deepspeed.nvme_path={folder}", *overrides)


def refused_here(config: RunConfig, ranks: int = 2) -> str:
    """The line by which a machine refuses."""
    with pytest.raises(ValueError) as refused:
        engine_checks.check_deepspeed_here(config, ranks)
    text = str(refused.value)
    assert "\n" not in text
    assert "; " in text
    return text


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all that offload to NVMe needs, and nothing compiled; returns where it would be."""
    file = tmp_path / "extensions" / "async_io" / "async_io.so"
    monkeypatch.setattr(engine_checks, "async_io_file", lambda: file)
    monkeypatch.setattr(engine_checks, "_links", lambda compiler: True)
    monkeypatch.setattr(engine_checks.shutil, "which", lambda name, path=None: f"/bin/{name}")
    return file


def test_a_machine_that_has_all_is_not_refused(able: Path, tmp_path: Path) -> None:
    engine_checks.check_deepspeed_here(in_files(tmp_path), 2)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_nvme_needs_a_folder_that_can_be_written(able: Path, tmp_path: Path) -> None:
    assert refused_here(in_files("/no/such/place")).startswith(
        "deepspeed.nvme_path=/no/such/place: is no folder"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert "is no folder here" in refused_here(in_files(file))
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "cannot be written by this user" in refused_here(in_files(closed))


def test_nvme_needs_a_file_system_with_direct_io(
    able: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(engine_checks.os, "open", refuse)
    monkeypatch.setattr(engine_checks.tempfile, "NamedTemporaryFile", lambda dir: nullcontext(tmp_path))
    assert "past the page cache (Invalid argument); use a folder on a local disk" in refused_here(
        in_files(tmp_path)
    )


def test_nvme_needs_room(able: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and a checkpoint on its way, of the ranks of this machine alone; a spare is left to others."""
    config = in_files(tmp_path, "train.precision=bf16")
    size = model_size(config.model, config.attention).total

    def free(num_bytes: float) -> None:
        monkeypatch.setattr(engine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=num_bytes))

    free(2**30 + 28 * size + 1)
    engine_checks.check_deepspeed_here(config, 2)
    free(2**30 + 28 * size - 1)
    text = refused_here(config)
    assert text.startswith(f"deepspeed.nvme_path={tmp_path}: the ranks of this machine need ")
    assert text.endswith(
        "use a larger disk, more machines, or deepspeed.offload_optimizer=cpu and deepspeed.offload_param=cpu"
    )
    # one of two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    engine_checks.check_deepspeed_here(config, 2, is_joined=True)


def test_nvme_locks_memory(able: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks.resource, "getrlimit", lambda which: (1000, 1000))
    monkeypatch.setattr(engine_checks, "_may_lock_all", lambda: False)
    text = refused_here(in_files(tmp_path))
    assert text.startswith("deepspeed.offload_optimizer=nvme: each rank locks at least ")
    assert "ulimit -l unlimited" in text


def test_what_is_not_compiled_needs_a_compiler_and_libaio(
    able: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = in_files(tmp_path, "deepspeed.offload_param=none")
    missing = ""
    monkeypatch.setattr(
        engine_checks.shutil, "which", lambda name, path=None: None if name == missing else name
    )
    for missing, package in (("ninja", "install ninja"), ("c++", "install g++")):
        monkeypatch.setenv("CXX", "c++")
        text = refused_here(only)
        assert text.startswith(f"deepspeed.offload_optimizer=nvme: DeepSpeed's async_io needs {missing}, ")
        assert package in text
    # compiled, it needs no C++ any more
    able.parent.mkdir(parents=True)
    able.write_text("")
    engine_checks.check_deepspeed_here(only, 2)
    able.unlink()
    missing = ""
    monkeypatch.setattr(engine_checks, "_links", lambda compiler: False)
    assert "install libaio-dev (Debian, Ubuntu) or libaio-devel" in refused_here(only)
    monkeypatch.setattr(engine_checks, "_links", lambda compiler: True)
    able.with_name("lock").write_text("")
    engine_checks.check_deepspeed_here(only, 2)
    os.utime(able.with_name("lock"), (0, 0))
    assert refused_here(only).endswith(f"remove {able.with_name('lock')}")


def test_the_test_program_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CFLAGS", raising=False)
    called = tmp_path / "called"
    for code in (0, 1):
        compiler = tmp_path / "cc"
        compiler.write_text(f"#!/bin/sh\necho $@ > {called}\nexit {code}\n")
        compiler.chmod(0o700)
        assert engine_checks._links(str(compiler)) is (code == 0)
        assert "-laio" in called.read_text()


def test_the_library_is_found_where_torch_compiles_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(async_io_file().parent) == _get_build_directory("async_io", verbose=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert str(async_io_file().parent) == _get_build_directory("async_io", verbose=False)
