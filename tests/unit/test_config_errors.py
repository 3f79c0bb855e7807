"""Bad input: exactly one line on stderr with value, rule and fix, exit code 2, nothing started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import train
from launchers.hydra_config.compose import compose_run, load_run
from launchers.local.kernel_checks import check_kernel, kernel_warning
from launchers.local.run_dir import claim_run_dir, disk_warning, write_config

ROOT = Path(__file__).parents[2]
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS")

# arguments, what the line names, the fix
MISTAKES = [
    ([], "run:", "run=demo"),
    (["run=dmo"], "run=dmo", "did you mean run=demo?"),
    (["demo"], "demo", "use run=demo"),
    (["run=demo", "modell=m3"], "modell=m3", "did you mean model?"),
    (["run=demo", "model=m4"], "model=m4", "the choices are m2, m3, msa_109b, tiny"),
    (["run=demo", "model=[m2]"], "model=[m2]", "the choices are"),
    (["run=demo", "train.stepz=50"], "train.stepz=50", "did you mean train.steps?"),
    (["run=demo", "+train.step=50"], "train.step=50", "did you mean train.steps?"),
    (["run=demo", "cp_size=4"], "cp_size=4", "did you mean parallel.cp_size?"),
    (["run=demo", "attention.top_k=4"], "attention.top_k=4", "did you mean attention.topk?"),
    (["run=demo", "~train.steps"], "~train.steps", "set a value"),
    (["run=demo", "xyzzy=1"], "xyzzy=1", "msa-train run=demo --cfg"),
    (["run=demo", "--chekc"], "--chekc", "did you mean --check?"),
    (["run=demo", "--train.steps=4"], "--train.steps=4", "options"),
    (["run=demo", "train.steps=many"], "train.steps=many", "a whole number"),
    (["run=demo", "train.steps=1e3"], "train.steps=1e3", "use 1000"),
    (["run=demo", "train.steps="], "train.steps=", "a whole number"),
    (["run=demo", "train.steps"], "train.steps", "use train.steps=VALUE"),
    (["run=demo", "train.steps=1,2"], "train.steps=1,2", "one run takes one value"),
    (["run=demo", "logging.tensorboard=maybe"], "logging.tensorboard=maybe", "true or false"),
    (["run=demo", "engine=megatrn"], "engine=megatrn", "did you mean megatron?"),
    (["run=demo", "parallel.kv_exchange=rign"], "parallel.kv_exchange=rign", "did you mean ring?"),
    (["run=demo", "exchange.hot_share=1.5"], "exchange.hot_share=1.5", "from 0 (none) to 1"),
    (["run=demo", "exchange.ranks_per_node=3"], "exchange.ranks_per_node=3", "use one of 0, 1, 2"),
    (["run=demo", "exchange.ranks_per_node=-2"], "exchange.ranks_per_node=-2", "use 0 for none"),
    (
        ["run=demo", "exchange.ranks_per_node=2", "parallel.kv_exchange=ring"],
        "exchange.ranks_per_node=2",
        "use exchange.ranks_per_node=0",
    ),
    (
        ["run=demo", "exchange.keep_for_backward=false", "parallel.kv_exchange=all_gather"],
        "exchange.keep_for_backward=false",
        "use exchange.keep_for_backward=true",
    ),
    (["run=demo", "train.tile_tokens=-1"], "train.tile_tokens=-1", "use 0 for no tiles"),
    (["run=demo", "optim.offload=1.5"], "optim.offload=1.5", "from 0 (all on the device) to 1"),
    (["run=demo", "optim.moments_dtype=bf61"], "optim.moments_dtype=bf61", "did you mean bf16?"),
    (["run=demo", "optim.moments_dtype=fp8"], "optim.moments_dtype=fp8", "or optim.algorithm=adamw"),
    (["run=demo", "optim.offload=0.5"], "optim.offload=0.5", "or optim.algorithm=adamw"),
    (
        ["run=demo", "optim.algorithm=adamw", "optim.moments_dtype=fp8", "optim.beta2=0.999"],
        "optim.beta2=0.999",
        "optim.beta2=0.95 (up to 0.98)",
    ),
    (
        ["run=m3_1m", "launcher.device=cpu", "optim.grads_dtype=bf16", "parallel.overlap_grad_reduce=true"],
        "optim.grads_dtype=bf16",
        "parallel.overlap_grad_reduce=false",
    ),
    (["run=demo", "optim.grads_dtype=bf16"], "optim.grads_dtype=bf16", "or train.precision=bf16"),
    (
        ["run=demo", "optim.algorithm=adamw", "optim.moments_dtype=bf16", "train.precision=fp64"],
        "optim.moments_dtype=bf16",
        "use optim.moments_dtype=fp32",
    ),
    (["run=demo", "train.bad_step=rolback"], "train.bad_step=rolback", "did you mean rollback?"),
    (["run=demo", "train.spike_factor=0.5"], "train.spike_factor=0.5", "use train.spike_factor=2, or 0"),
    (["run=demo", "train.max_skipped=0"], "train.max_skipped=0", "at least 1"),
    (
        ["run=demo", "train.bad_step=rollback", "checkpoint.every=0"],
        "train.bad_step=rollback",
        "a larger checkpoint.every",
    ),
    (
        ["run=demo", "checkpoint.every=30", "checkpoint.keep_every=100"],
        "checkpoint.keep_every=100",
        "use checkpoint.keep_every=120",
    ),
    (["run=demo", 'data.corpus="a"b'], 'data.corpus="a"b', "quote the value"),
    (["run=demo", "run_dir=${nowhere}"], "run_dir", "nowhere"),
    (["run=demo", "run_dir="], "run_dir=", "use run_dir=runs/mine"),
    (["run=demo", "data.corpus="], "data.corpus=", "stdlib"),
    (["run=demo", "model.num_kv_heads=3"], "model.num_kv_heads=3", "must divide model.num_heads=4"),
    (["run=demo", "parallel.tp_size=2", "model.qk_norm=width"], "parallel.tp_size=2", "parallel.tp_size=1"),
    (
        ["run=demo", "parallel.pp_size=3", "model.tie_embeddings=true"],
        "parallel.pp_size=3",
        "model.tie_embeddings=false",
    ),
    (["run=demo", "attention.kernel=tritn"], "attention.kernel=tritn", "did you mean triton?"),
    (
        ["run=demo", "attention.kernel=triton", "train.precision=fp64"],
        "attention.kernel=triton",
        "use attention.kernel=auto",
    ),
    (["run=demo", "model.init_std=0"], "model.init_std=0", "must be positive"),
    (["run=demo", "train.seed=-1"], "train.seed=-1", "must not be negative"),
    (["run=demo", "model.layer_attention=ful"], "model.layer_attention=ful", "full, msa, swa"),
    (["run=demo", "attention.window=0"], "attention.window=0", "must be at least 1"),
    (["run=demo", "attention.window_sink=-1"], "attention.window_sink=-1", "use 0 for none"),
    (["run=demo", "logging.attention_queries=0"], "logging.attention_queries=0", "must be at least 1"),
    (["run=demo", "logging.attention_every=-1"], "logging.attention_every=-1", "must not be negative"),
    (["run=demo", "logging.selections_every=-1"], "logging.selections_every=-1", "must not be negative"),
    (
        ["run=demo", "logging.selections_every=5", "parallel.cp_head_size=2"],
        "logging.selections_every=5",
        "use parallel.cp_head_size=1",
    ),
    (["run=demo", "parallel.cp_layout=zigzg"], "parallel.cp_layout=zigzg", "did you mean zigzag?"),
    (
        ["run=demo", "parallel.cp_layout=zigzag", "data.seq_len=8208"],
        "data.seq_len=8208",
        "use 8192 or 8224, or parallel.cp_layout=contiguous",
    ),
    (["run=demo", "data.seq_len=8010"], "data.seq_len=8010", "use 8000 or 8016"),
    (["run=demo", "launcher.num_processes=3"], "launcher.num_processes=3", "use launcher.num_processes=2"),
    (["run=demo", "parallel.cp_size=4"], "launcher.num_processes=2", "use launcher.num_processes=4"),
    (["run=demo", "parallel.cp_head_size=0"], "parallel.cp_head_size=0", "must be at least 1"),
    (["run=demo", "parallel.cp_head_size=4"], "parallel.cp_head_size=4", "parallel.cp_size=2"),
    (
        ["run=demo", "parallel.cp_head_size=2", "model.num_kv_heads=1"],
        "parallel.cp_head_size=2",
        "use parallel.cp_head_size=1",
    ),
    (
        ["run=demo", "parallel.cp_head_size=2", "exchange.ranks_per_node=1"],
        "exchange.ranks_per_node=1",
        "must be a multiple of parallel.cp_head_size=2",
    ),
    (["run=demo", "parallel.ep_size=3"], "parallel.ep_size=3", "use one of 1, 2, 4, 8"),
    (["run=demo", "launcher.num_processes=4"], "train.global_batch_size=1", "use train.global_batch_size=2"),
    (["run=demo", "optim.lr=0"], "optim.lr=0", "must be positive"),
    (["run=demo", "optim.lr=nan"], "optim.lr=nan", "must be a finite number"),
    (["run=demo", "attention.index_head_dim=8"], "attention.index_head_dim=8", "model.rotary_dim=24"),
    (["run=demo", "data.validation_fraction=0"], "train.validate_every=60", "use train.validate_every=0"),
    (["run=demo", "launcher.device=cpu", "engine=megatron"], "engine=megatron", "use engine=torch"),
    (
        ["run=demo", "parallel.tp_size=2", "parallel.cp_size=1"],
        "parallel.tp_size=2",
        "use parallel.tp_size=1",
    ),
]


@pytest.fixture(autouse=True)
def _alone_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: 0)


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that these arguments get."""
    code = train.main(arguments)
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.startswith("msa-train: error: ")
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize(("arguments", "names", "fix"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistake_gets_one_line(
    arguments: list[str], names: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse([*arguments, "--check"], capsys)
    assert line.startswith(f"msa-train: error: {names}")
    assert fix in line


def test_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "launcher.device=cuda: no GPU" in refuse(["run=demo", "launcher.device=cuda"], capsys)


def test_more_processes_than_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: 1)
    line = refuse(["run=demo", "launcher.num_processes=2", "engine=torch"], capsys)
    assert "launcher.num_processes=2: one process per GPU and this machine has 1" in line


@pytest.mark.parametrize(
    ("installed", "num_gpus", "interpreted", "arguments", "words"),
    [
        (False, 1, False, [], "triton is not installed"),
        (True, 0, False, [], "runs on GPUs, not on device=cpu"),
        (True, 1, False, ["attention.block_size=512", "data.seq_len=8192"], "block_size=512"),
        (True, 0, True, ["attention.topk=80"], "topk=80: must be from 1 to 64"),
        (
            True,
            1,
            False,
            ["model.num_heads=130", "model.num_kv_heads=2"],
            "heads per group=65: must be at most 64",
        ),
    ],
)
def test_triton_where_it_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: bool,
    num_gpus: int,
    interpreted: bool,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: installed)
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: num_gpus)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    sizes = ["parallel.cp_size=1", "parallel.ep_size=1", "engine=torch", "train.precision=bf16"]
    line = refuse(
        ["run=demo", *sizes, "launcher.num_processes=1", "attention.kernel=triton", *arguments], capsys
    )
    assert line.startswith("msa-train: error: attention.kernel=triton: ")
    assert words in line
    assert line.rstrip().endswith("take attention.kernel=auto")


def test_triton_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in the interpreter, and where no layer asks for it."""
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: True)
    config = compose_run(["run=demo", "attention.kernel=triton"])
    check_kernel(config, on_gpu=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_kernel(config, on_gpu=False)
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: False)
    check_kernel(compose_run(["run=m2_32k", "attention.kernel=triton"]), on_gpu=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["attention.topk=80"], "topk=80: must be from 1 to 64"),
        (["train.precision=fp64"], "float64"),
        (["attention.block_size=512"], "block_size=512"),
    ],
)
def test_auto_says_why_it_leaves_triton_out(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    """Once, by whoever prepares the run; never where Triton is taken, asked for, or not to be had."""
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: True)
    config = compose_run(["run=demo", *arguments])
    line = kernel_warning(config, on_gpu=True)
    assert line is not None
    assert line.startswith("attention.kernel=auto: takes the tiled torch path")
    assert reason in line
    assert "\n" not in line
    assert kernel_warning(config, on_gpu=False) is None
    assert kernel_warning(compose_run(["run=demo", "train.precision=bf16"]), on_gpu=True) is None
    assert kernel_warning(compose_run(["run=demo", *arguments, "attention.kernel=cpu"]), on_gpu=True) is None
    assert kernel_warning(compose_run(["run=m2_32k", *arguments]), on_gpu=True) is None
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: False)
    missing = kernel_warning(compose_run(["run=demo"]), on_gpu=True)
    assert missing is not None
    assert "triton is not installed" in missing


def test_checking_a_run_tells_of_slow_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: True)
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: 2)
    corpus = tmp_path / "a.txt"
    corpus.write_text("some text " * 1000)
    settings = ["run=smoke", f"data.corpus={corpus}", f"data.cache_dir={tmp_path}", f"run_dir={tmp_path}"]
    settings += ["data.validation_fraction=0", "train.validate_every=0", "engine=torch", "--check"]
    assert train.main([*settings, "attention.topk=70"]) == 0
    assert capsys.readouterr().out.count("warning: attention.kernel=auto: takes the tiled torch path") == 1


def test_unwritable_run_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    run_dir = tmp_path / "file" / "run"
    line = refuse(["run=demo", f"run_dir={run_dir}"], capsys)
    assert f"run_dir={run_dir}: cannot be written" in line
    assert "use a folder" in line
    line = refuse(["run=demo", f"run_dir={run_dir}", "--check"], capsys)
    assert f"run_dir={run_dir}: cannot be written" in line


def test_second_launcher_on_a_run_dir_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = claim_run_dir(str(tmp_path))
    line = refuse(["run=demo", f"run_dir={tmp_path}"], capsys)
    assert f"run_dir={tmp_path}: another msa-train (pid {os.getpid()} on " in line
    lock.close()
    claim_run_dir(str(tmp_path)).close()


def test_other_ranks_of_a_job_leave_the_message_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its end is theirs; where it is not, RANK is left over, and silence would be a riddle."""
    before: list[str] = []
    monkeypatch.setattr(train.time, "sleep", lambda seconds: before.append(capsys.readouterr().err))
    monkeypatch.setenv("RANK", "1")
    assert train.main(["run=dmo"]) == 2
    assert before == [""]
    assert "did you mean run=demo?" in capsys.readouterr().err


def test_mistake_is_found_without_torch() -> None:
    code = (
        "import sys; from launchers.train import main; code = main(['run=demo', 'data.seq_len=8010']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr


def test_damaged_config_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  stepz: 4\n")
    with pytest.raises(ValueError, match=r"did you mean train\.steps\?"):
        load_run(path)


def test_earlier_config_is_kept_if_it_differs(tmp_path: Path) -> None:
    config = compose_run(["run=demo", f"run_dir={tmp_path}"])
    write_config(config)
    write_config(config)
    assert [path.name for path in tmp_path.glob("config*")] == ["config.yaml"]
    config.train.steps += 1
    assert load_run(write_config(config)) == config
    (earlier,) = tmp_path.glob("config.2*.yaml")
    assert load_run(earlier).train.steps == config.train.steps - 1


def test_no_kept_config_is_lost_when_clocks_go_back(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four"):
        path = write_config(compose_run(["run=smoke", f"run_dir={tmp_path}", f"name={name}"]))
        os.utime(path, (10**9, 10**9))
    kept = [load_run(str(path)).name for path in sorted(tmp_path.glob("config*.yaml"))]
    assert sorted(kept) == ["four", "one", "three", "two"]


def test_disk_warning_names_the_sizes(tmp_path: Path) -> None:
    assert disk_warning(compose_run(["run=demo", f"run_dir={tmp_path}"])) is None
    config = compose_run(["run=demo", "model=m3", f"run_dir={tmp_path}", "checkpoint.keep_last=100"])
    warning = disk_warning(config)
    assert warning is not None
    assert "101 checkpoints take about 688" in warning
    config.checkpoint.every = 0
    assert disk_warning(config) is None
