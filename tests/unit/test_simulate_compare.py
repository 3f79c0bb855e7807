"""Predicted against measured: rows whose time is known by hand, and files that are none."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from launchers import simulate
from msa_train.simulate.reports.predicted_vs_measured import (
    LATENCY_S,
    MBIT,
    compare_file,
    comparison_data,
    comparison_text,
)

P, T, COMPUTE_S, HEADERS, CORES = 4, 1024, 0.2, 1.02, 2
# 4 KV groups of 128 channels in fp32; 32 pairs of a rank, blocks of 128 tokens
KV_TOKEN, INDEX_TOKEN, GRAD_TOKEN = 4096, 512, 4096 + 4 * 512
RATE = 100
# the rest of the computing time is beside attention
SOURCES = {"forward_own": 0.03, "forward_others": 0.03, "backward_own": 0.05, "backward_others": 0.07}
SELECTION = {
    "part": "4", "selection": "0.5", "seq_len": P * T, "block_size": 128, "topk": 4, "num_kv_heads": 4,
    "heads_per_group": 1, "head_dim": 128, "index_head_dim": 128, "bytes_per_element": 4, "with_kl": True,
    "pairs": [[0 if r == o else 16 for o in range(P)] for r in range(P)],
}  # fmt: skip


def row(scheme: str, rate_mbit: int, step_s: float, bytes_each: float) -> dict[str, Any]:
    return {
        "part": "4", "selection": "0.5", "rate_mbit": rate_mbit, "node_rate_mbit": 0, "scheme": scheme,
        "f": 0.5,
        "step_s_median": step_s, "compute_cpu_s": [COMPUTE_S] * P, "process_cpu_s": [COMPUTE_S] * P,
        "sources_cpu_s_mean": SOURCES, "counted_bytes": [bytes_each] * P,
        "interface_received_bytes": [HEADERS * bytes_each] * P,
    }  # fmt: skip


def all_gather_bytes() -> float:
    return 3 * T * (INDEX_TOKEN + 2 * KV_TOKEN + GRAD_TOKEN)


def all_reduce_bytes() -> float:
    return 3 * T * (INDEX_TOKEN + KV_TOKEN + 2 * GRAD_TOKEN)


def measured() -> dict[str, Any]:
    """All-reduce overlaps nothing: its time is that of all parts, processes sharing the cores."""
    computing = COMPUTE_S * P / CORES
    wire = HEADERS * all_reduce_bytes() / (RATE * MBIT)
    # steps in a row: 3 of each gather, twice as many of the all-reduce
    latencies = 12 * LATENCY_S
    return {
        "shape": {}, "machine": {"cores": CORES}, "selections": [SELECTION],
        "rows": [
            row("all_gather", 0, 0.5, all_gather_bytes()),
            row("all_gather_all_reduce", RATE, computing + wire + latencies, all_reduce_bytes()),
            row("some_other", RATE, 1.0, 1.0),
        ],
    }  # fmt: skip


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "exchange.json"
    path.write_text(json.dumps(data))
    return path


def test_a_time_known_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, measured())
    (found,) = compare_file(path)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.predicted_bytes == found.counted_bytes == P * all_reduce_bytes()
    assert simulate.main(["compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 within 15%" in out
    assert "0% | 1.000 |" in out
    assert simulate.main(["compare", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == comparison_data([found])


def test_an_error_is_told_with_its_sign(tmp_path: Path) -> None:
    data = measured()
    data["rows"][1]["step_s_median"] *= 2
    data["rows"].append(deepcopy(data["rows"][1]) | {"step_s_median": data["rows"][1]["step_s_median"] / 2.2})
    slow, fast = compare_file(write(tmp_path, data))
    assert slow.error == pytest.approx(-0.5, abs=1e-6)
    assert fast.error == pytest.approx(0.1, abs=1e-6)
    assert comparison_data([slow, fast])["worst_error"] == slow.error
    text = comparison_text([slow, fast])
    assert "1 of 2 within 15%" in text
    assert "the farthest is -50% (all_gather_all_reduce, 4 ranks, 100 Mbit/s, f 0.500)" in text


def test_every_scheme_is_predicted(tmp_path: Path) -> None:
    data = measured()
    names = (
        "ring",
        "selected",
        "selected_no_hot",
        "selected_again",
        "selected_by_node",
        "auto",
        "all_gather",
    )
    data["rows"] += [row(name, RATE, 1.0, 1e6) | {"used": "selected"} for name in names]
    found = {one.scheme: one for one in compare_file(write(tmp_path, data))}
    assert set(found) == {*names, "all_gather_all_reduce"}
    # 16 of 32 pairs from each of 3 ranks, each 128 tokens of a group; gradients of as many, and requests
    pair = 128 * KV_TOKEN / 4
    request = 3 * (64 + P * 4)
    expected = 3 * (T * INDEX_TOKEN + 16 * pair + 16 * 128 * GRAD_TOKEN / 4) + request
    assert found["selected_no_hot"].predicted_bytes == P * expected
    again = found["selected_again"].predicted_bytes - found["selected"].predicted_bytes
    # hot pairs come by slices, a little unevenly
    assert again == pytest.approx(P * 3 * 16 * pair, rel=0.1)
    assert found["selected"].predicted_s < found["all_gather"].predicted_s < found["ring"].predicted_s


def test_the_link_between_nodes_limits_what_crosses_it(tmp_path: Path) -> None:
    data = measured()
    data["rows"] = [data["rows"][0], row("ring", 1000, 1.0, 1.0) | {"node_rate_mbit": 10}]
    (found,) = compare_file(write(tmp_path, data))
    # both nodes' links carry one rank's share of the ring, each way
    crossing = HEADERS * T * (3 * KV_TOKEN * 2 + 4 * GRAD_TOKEN + 3 * INDEX_TOKEN)
    assert found.predicted_s > crossing / (10 * MBIT)
    assert found.predicted_s < 1.2 * crossing / (10 * MBIT) + COMPUTE_S * P / CORES


def test_no_step_is_shorter_than_what_its_processors_do(tmp_path: Path) -> None:
    data, busy = measured(), [1.5 * COMPUTE_S] * P
    quick = row("selected", 100_000, 1.0, 1e9) | {"process_cpu_s": busy}
    data["rows"] = [data["rows"][0], quick]
    (found,) = compare_file(write(tmp_path, data))
    assert found.predicted_s == pytest.approx(sum(busy) / CORES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("rows"), "rows is missing; name a result of benchmarks/exchange"),
        (
            lambda data: data["rows"].pop(1),
            "has no row with a limited rate; run the benchmark without --unshaped",
        ),
        (
            lambda data: data["rows"].pop(0),
            "part 4, selection 0.5 has no all_gather without a limit; run the",
        ),
        (lambda data: data["rows"][1].pop("f"), "'f' is missing; name a result of benchmarks/exchange"),
    ],
)
def test_files_that_do_not_serve(change: Any, message: str, tmp_path: Path) -> None:
    data = measured()
    change(data)
    path = write(tmp_path, data)
    with pytest.raises(ValueError) as error:
        compare_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
