"""The msa-simulate command: tables, JSON, files of its settings, and one clear line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launchers import simulate
from msa_train.parallel.selection_file import SelectionRecorder
from msa_train.simulate.inputs.cluster import PRESETS, load_cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.rates import RATE_NAMES, load_rates, shipped_rates
from msa_train.simulate.measure import MeasuredRates, measure_rates, write_rates

SMALL = ("--seq-len", "64K", "--cp-size", "16")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = simulate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_tables_name_every_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run", *SMALL, "--f", "0.2")
    assert (code, err) == (0, "")
    for word in (
        *simulate.SCHEMES,
        "ring_unbalanced",
        "64K tokens",
        "f 0.200",
        "h100_assumed (assumption)",
        "f=0.2",
    ):
        assert word in out


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys,
        "run",
        *SMALL,
        "--alike-tokens",
        "128",
        "--json",
        "--schemes",
        "selected,auto",
        "--cp-head-size",
        "2",
    )
    assert code == 0
    data: dict[str, Any] = json.loads(out)
    assert set(data["msa"]) == {"selected", "auto"}
    one = data["msa"]["selected"]
    parts = one["compute_s"] + one["copying_s"] + one["imbalance_s"] + one["exposed_s"]
    assert one["layer_s"] == pytest.approx(parts)
    assert one["received_bytes_mean"] == pytest.approx(sum(one["received_bytes_mean_by_purpose"].values()))
    assert data["scenario"]["options"]["head_size"] == 2
    assert data["scenario"]["cluster"]["source"] == PRESETS["h100"].source


def test_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("scale", *SMALL, "--alike-tokens", "128", "--sizes", "16,32", "--schemes", "ring,selected")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "weak scaling" in out
    assert "100%" in out
    code, out, _ = run(capsys, *arguments, "--strong", "--json")
    assert [point["cp_size"] for point in json.loads(out)] == [8, 16, 32]
    assert {point["seq_len"] for point in json.loads(out)} == {65536}


def test_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One block for all: the document's first."""
    blocks = np.full((8192, 4, 16), -1)
    blocks[..., 0] = np.arange(8192)[:, None] // 128
    blocks[128:, :, 1] = 0
    recorder = SelectionRecorder(8192, 128, 4, 16, 0, 8192, 128, [0, 8192])
    recorder.add(3, blocks)
    recorder.save(tmp_path / "part.npz", "by hand")
    arguments = ("run", "--seq-len", "8K", "--cp-size", "8", "--selections", tmp_path)
    code, out, _ = run(capsys, *arguments, "--json", "--schemes", "selected", "--hot-share", "0")
    data = json.loads(out)
    # 7 of 8 ranks want 4 pairs out of 7 * 8 * 4
    assert data["f"] == pytest.approx(7 * 4 / 8 / 224)
    assert data["msa"]["selected"]["received_bytes_mean_by_purpose"]["kv"] == 7 / 8 * 4 * 65536
    assert data["selections"] == "recorded, layer 3: by hand"
    for extra, message in (
        (("--layer", "4"), "--layer=4: {} has layers 3; name one of them"),
        (("--num-docs", "2"), "--num-docs=2: a recording has its own documents; leave it out"),
        (("--model", "m2"), "num_kv_heads=4 in the recording: must be the model's 8; use its --model"),
    ):
        code, _, err = run(capsys, *arguments, *extra)
        assert (code, err) == (2, f"msa-simulate: error: {message.format(tmp_path)}\n")
    code, _, err = run(capsys, "scale", *arguments[1:])
    assert "a recording has one length, weak scaling has many; add --strong" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", *SMALL), "selections=none: give exactly one of --f, --alike-tokens, --selections"),
        (("run", *SMALL, "--f", "1", "--alike-tokens", "2"), "selections=--f, --alike-tokens: give exactly"),
        (("run", *SMALL, "--f", "0.7"), "f=0.7: with this layout and these documents a rank may see 0.500 o"),
        (("run", *SMALL, "--f", "-1"), "f=-1.0: must be from 0 to 1"),
        (("run", *SMALL, "--f", "x"), "argument --f: invalid number value: 'x'; see msa-simulate --help"),
        (("run", *SMALL, "--alike-tokens", "96"), "alike_tokens=96: must be a multiple or a divisor of bloc"),
        (("run", "--seq-len", "64", "--cp-size", "1", "--f", "0"), "seq_len=64: must be a multiple of"),
        (("run", "--seq-len", "1Q", "--cp-size", "1", "--f", "0"), "1Q: must be a positive number of tokens"),
        (("run", "--seq-len", "11M", "--cp-size", "8", "--f", "0"), "seq_len=11534336: must be from 1 to 10"),
        (("run", "--seq-len", "8M", "--cp-size", "2048", "--f", "0"), "cp_size=2048: must be from 1 to 1024"),
        (("run", "--seq-len", "60K", "--cp-size", "12", "--f", "0"), "cp_size=12: must be at most gpus_per_"),
        (("run", *SMALL, "--f", "0", "--cp-head-size", "3"), "cp_head_size=3: must divide num_kv_heads=4 an"),
        (("run", *SMALL, "--f", "0", "--cluster", "h1000"), "cluster=h1000: is neither a preset (h100, "),
        (("run", *SMALL, "--f", "0", "--rates", "fast"), "rates=fast: is neither shipped (h100_assumed, "),
        (("run", *SMALL, "--f", "0", "--model", "m4"), "--model=m4: must be one of m2, m3, "),
        (("run", *SMALL, "--f", "0", "--attention", "m"), "--attention=m: must be one of msa, "),
        (("run", *SMALL, "--f", "0", "--schemes", "ring,rong"), "argument --schemes: rong: must be of ring,"),
        (("run", *SMALL, "--f", "0", "--layout", "zagzig"), "argument --layout: invalid choice: 'zagzig'"),
        (("run", *SMALL, "--f", "0", "--num-docs", "600"), "num_docs=600: must be from 1 to the number of b"),
        (("run", *SMALL, "--f", "0", "--hot-share", "2"), "hot_share=2.0: must be from 0 (none is broadcast"),
        (("run", *SMALL, "--selections", "no/such"), "no/such: cannot be read"),
        (("scale", *SMALL, "--f", "0", "--sizes", "16,x"), "argument --sizes: 16,x: must be numbers of rank"),
        (("compare", "no/such.json"), "no/such.json: cannot be read (No such file or directory); name a YAM"),
        (("measure", "--out", "rates.txt"), "--out=rates.txt: must end in .yaml"),
        (("measure", "--out", "r.yaml", "--tokens", "100"), "--tokens=100: must be a multiple of 128"),
        (("fly",), "argument run|scale|tables|measure|compare: invalid choice: 'fly'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"msa-simulate: error: {message}") or message in err
    assert err.count("\n") == 1


def test_mistakes_do_not_wait_for_torch() -> None:
    """It takes seconds to import; what is wrong is said before."""
    program = (
        "import sys; from launchers import simulate; "
        "code = simulate.main(['run', '--seq-len', '64K', '--cp-size', '16', '--f', '0.7']); "
        "sys.exit(10 * code + ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 20, done.stderr


def test_clusters_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "gpus_per_node": 4, "node_rate_bytes": 3e11, "network_rate_bytes": "25e9", "node_latency_s": 0,
        "network_latency_s": 1e-5, "host_sync_s": 1e-5,
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    cluster = load_cluster(str(path))
    assert (cluster.name, cluster.gpus_per_node, cluster.network_rate_bytes) == ("mine", 4, 25e9)
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert load_cluster(str(tmp_path / "mine.json")) == cluster
    code, out, _ = run(capsys, "run", *SMALL, "--f", "0.1", "--cluster", path)
    assert code == 0
    assert "cluster mine" in out
    for changes, message in (
        ({"nvlink": 3}, "nvlink is not a field; known are name, gpus_per_node"),
        ({"gpus_per_node": 0}, "gpus_per_node=0: must be positive"),
        ({"gpus_per_node": "four"}, "gpus_per_node=four: must be a whole number"),
        ({"node_rate_bytes": "fast"}, "node_rate_bytes=fast: must be a number"),
    ):
        path.write_text(yaml.safe_dump({**values, **changes}))
        code, _, err = run(capsys, "run", *SMALL, "--f", "0.1", "--cluster", path)
        assert (code, err) == (2, err)
        assert f"{path}: {message}" in err
    del values["gpus_per_node"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ValueError, match="gpus_per_node is missing; needed are name, gpus_per_node, node_rate"
    ):
        load_cluster(str(path))
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_cluster(str(path))
    path.write_text("- 3")
    with pytest.raises(ValueError, match="must hold names with values, holds list"):
        load_cluster(str(path))


def test_shipped_rates_say_where_they_are_from() -> None:
    for name in shipped_rates():
        rates = load_rates(name)
        assert set(rates.sources) == set(RATE_NAMES)
        assert all(len(source) > 5 for source in rates.sources.values())
    assert load_rates("h100_assumed").kind == "assumption"
    assert load_rates("xeon_cpu").kind == "measured"


def test_rates_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    measured = MeasuredRates({name: 2.5e9 for name in RATE_NAMES}, "a device", "3 tokens")
    write_rates(path, measured, "a command")
    content = yaml.safe_load(path.read_text())
    assert load_rates(str(path)).index_flops == 2.5e9

    def changed(**values: Any) -> str:
        path.write_text(yaml.safe_dump({**content, "rates": {**content["rates"], **values}}))
        with pytest.raises(ValueError) as error:
            load_rates(str(path))
        return str(error.value)

    assert "rates.index_flops: must have a value and its source" in changed(index_flops={"value": 3})
    assert "rates.kl_flops=much: must be a number" in changed(kl_flops={"value": "much", "source": "x"})
    assert "copy_bytes=0.0: must be positive" in changed(copy_bytes={"value": 0, "source": "x"})
    assert "colour is not a rate" in changed(colour={"value": 1, "source": "x"})
    path.write_text(yaml.safe_dump({**content, "kind": "guess"}))
    with pytest.raises(ValueError, match="kind=guess: must be one of measured, assumption"):
        load_rates(str(path))


def test_rates_are_measured_on_this_machine() -> None:
    shape = LayerShape(
        hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=3
    )
    measured = measure_rates(shape, num_tokens=32, seq_len=128, rounds=1)
    assert set(measured.rates) == set(RATE_NAMES)
    assert all(np.isfinite(rate) and rate > 0 for rate in measured.rates.values())
    assert measured.device
