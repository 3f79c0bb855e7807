"""The CPU benchmark's table, on numbers done by hand."""

from typing import Any

from benchmarks.cpu_kernels.report import markdown, per_token

GIB = 2**30


def _run(seconds: float, peak: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_s": seconds,
        "others_share": 0.02,
        "peak_bytes": peak,
        "process_bytes": GIB // 4,
    }


def test_table_and_goals() -> None:
    result: dict[str, Any] = {
        "command": "x",
        "seconds": 60,
        "machine": {"commit": "c", "cores": 2, "cpu": "p", "kernel": "k", "python": "3"},
        "threads": 2,
        "shape": {
            "num_heads": 16,
            "num_kv_heads": 1,
            "head_dim": 128,
            "index_dim": 128,
            "block_size": 128,
            "topk": 16,
        },
        "memory_shape": {"num_heads": 16, "head_dim": 64},
        "worst_row": 1e-6,
        "times": [
            {
                "seq_len": 131072,
                "dense_heads": [2],
                "runs": {"msa": [_run(100, 2 * GIB)], "dense_2": [_run(60, GIB)]},
                "msa_s": 100.0,
                "dense_2_s": 60.0,
                "dense_2_scaled_s": 480.0,
                "ratio": 4.8,
            }
        ],
        "memory": [
            {"seq_len": 32768, **_run(1, GIB // 4 + GIB // 2)},
            {"seq_len": 65536, **_run(2, GIB // 4 + GIB)},
        ],
    }
    text = markdown(result)
    assert "| 131072 | 1 | 100.0 | 480.0 (2 heads: 60.0) | 4.80x | 2.00 GiB | 1.00 GiB | 2.0% |" in text
    assert "- 131072 tokens: 4.80 times as fast as dense; 3 is wanted." in text
    assert "| 65536 | 1.25 GiB | 1.00 GiB | 16.0 KiB |" in text
    assert "from 32768 to 65536 tokens, 2 times as many: 2.0 times as much" in text
    assert per_token(result["memory"][0]) == 16 * 1024
