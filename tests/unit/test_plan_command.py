"""The msa-plan command: tables, JSON, a search whose settings msa-train accepts, a line for every mistake."""

import json
import re

import pytest

from launchers import plan
from launchers.hydra_config.compose import compose_run
from msa_train.config import check_rules
from tests.helpers.plan_models import SMALL_MODEL


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_is_told_by_stage_and_part(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run=m3_200k", "data.seq_len=32768", "--gpu-memory", "141")
    assert (code, err) == (0, "")
    for word in (
        *("stage 3", "weights", "gradients", "optimizer", "kept activations", "peak", "left of the GPU"),
        *("scoring", "experts", "bubble", "tokens/s per GPU", "MFU", "f 0.2", "h100_assumed (assumption)"),
    ):
        assert word in out


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run=m3_200k", "data.seq_len=32768", "--gpu-memory", "141", "--json")
    data = json.loads(out)
    assert code == 0
    assert len(data["stages"]) == data["parallel"]["pp_size"]
    for stage in data["stages"]:
        assert sum(stage["device"].values()) == pytest.approx(stage["peak"])
    assert sum(data["time"]["parts"].values()) == pytest.approx(data["time"]["seconds"])


def test_stages_are_planned_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("stages=warmup", "stages.dense_warmup.seq_len=32768", "data.seq_len=65536")
    given += ("stages.dense_warmup.parallel.cp_size=8", "stages.dense_warmup.global_batch_size=64")
    stages = ("run=m3_200k", "train.steps=0", "stages.sparse.tokens=1000000000", *given)
    code, out, err = run(capsys, *stages, "--gpu-memory", "400")
    assert (code, err) == (0, "")
    assert out.index("stage dense_warmup:\n") < out.index("stage sparse:\n")
    assert "cp 8" in out.partition("stage sparse:")[0]
    code, out, _ = run(
        capsys, "run=m3_200k", *stages, "--of-stage", "sparse", "--json", "--gpu-memory", "400"
    )
    assert code == 0
    assert json.loads(out)["parallel"]["cp_size"] == 16
    for extra, line in (
        ("--json", "--json: prints one plan, and the stages have several layouts"),
        ("--of-stage=long", "--of-stage=long: there is no such stage; use one of dense_warmup, sparse"),
    ):
        code, _, err = run(capsys, *stages, extra)
        assert code == 2
        assert line in err


@pytest.mark.parametrize(
    ("name", "stages", "more"),
    [
        ("extend_200k_to_1m", ["at_512k", "at_1m"], ()),
        (
            "extend_200k_to_1m",
            ["at_1m"],
            ("parallel.cp_size=32", "parallel.ep_size=32", "--gpu-memory", "141"),
        ),
        ("extend_m2_200k_to_1m", ["index_warmup", "sparse_200k", "at_512k", "at_1m"], ()),
        # states on the host: without that they do not fit
        ("extend_m3_64", ["at_512k", "at_1m"], ("--gpus", "64", "--gpu-memory", "141")),
        ("extend_m2_64", ["index_warmup", "sparse_200k", "at_512k", "at_1m"], ("--gpus", "64")),
    ],
)
def test_extensions_fit_in_every_stage(
    name: str, stages: list[str], more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in stages:
        code, out, err = run(capsys, f"run={name}", *more, "--of-stage", stage)
        assert (code, err) == (0, ""), stage
        assert "1M tokens" in out or stage != "at_1m"


def test_a_run_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "run=m3_200k", "data.seq_len=32768", "--gpu-memory", "40")
    assert code == 1
    assert re.fullmatch(
        r"msa-plan: does not fit: stage \d needs \d+\.\d GiB more than GPUs of 40 GB have; try "
        r"msa-plan --gpus \d+ --seq-len 32768 model=m3\n",
        err,
    )


def test_what_a_search_prints_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ("--gpus", "16", "--gpu-memory", "16")
    searched = ("--seq-len", "32K", "--global-batch", "8", "--best", "3")
    code, out, _ = run(capsys, *gpus, *searched, *SMALL_MODEL)
    assert code == 0
    found = re.findall(r"^\d+\. msa-train (.*)$", out, re.MULTILINE)
    assert len(found) == 3
    seconds = []
    for line in found:
        settings = line.split()
        check_rules(compose_run(settings), world_size=16, has_gpu=True)
        code, out, _ = run(capsys, *settings, *gpus, "--json")
        assert code == 0, "a layout that the search found fits"
        seconds.append(json.loads(out)["time"]["seconds"])
    assert seconds == sorted(seconds)


def test_a_search_without_a_result_says_how_many_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--gpus", "2", "--seq-len", "32K", "--global-batch", "8", "--gpu-memory", "4")
    code, out, err = run(capsys, *arguments, *SMALL_MODEL)
    assert (code, out) == (1, "")
    assert "msa-plan: nothing fits 2 GPUs of 4 GB: the smallest layout needs" in err
    assert re.search(r"msa-plan: (4|8|16|32) GPUs would do", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--gpus: is needed to search; give it, or a run such as run=m3_1m"),
        (("run=m3_1m", "--f", "2"), "f=2.0: must be a share, from 0 to 1"),
        (("run=m3_1m", "--imbalance", "0.5"), "imbalance=0.5: must be at least 1, the mean itself"),
        (("run=m3_1m", "--num-docs", "0"), "num_docs=0: must be at least 1"),
        (("run=m3_1m", "--cluster", "moon"), "cluster=moon: is neither a preset"),
        (("run=m3_1m", "--seq-len", "1X"), "argument --seq-len: 1X: must be a positive number of tokens"),
        (("run=m3_1m", "--stages", "a"), "argument --stages: a: must be numbers of stages such as 0,3"),
        (("run=m3_1m", "--gpus", "100"), "launcher.num_processes=100: must be a multiple of"),
        (("run=nothing",), "run=nothing"),
        (
            ("run=m3_1m", "--trace", "parallel.moe_dispatcher=deepep"),
            "parallel.moe_dispatcher=deepep: --trace runs the step without a GPU",
        ),
        (
            ("run=m3_1m", "--trace", "model.implementation=transformer_engine"),
            "use model.implementation=torch with --trace",
        ),
        (("run=m3_1m", "--what"), "unrecognized arguments: --what; see msa-plan --help"),
        (("--gpus", "0", "model=m3"), "--gpus=0: must be at least 1"),
        (("run=m3_1m", "--best", "0"), "--best=0: must be at least 1"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("msa-plan: error: ")
    assert message in err
    assert err.count("\n") == 1
