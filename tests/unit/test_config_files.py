"""Configuration folders, which may be a stranger's: what they cannot do, and that text stays as it is."""

from pathlib import Path

import pytest

from launchers.hydra_config.compose import compose_run, config_to_yaml, load_run
from launchers.hydra_config.compose_cluster import compose_cluster
from launchers.hydra_config.options import config_dir
from launchers.hydra_config.text_values import literal, quoted, split_choices
from launchers.submit import main as submit
from launchers.train import main as train

HEAD = "# @package _global_\ndefaults:\n  - override /model: tiny\n"

TEXTS = [
    *(
        "2024_01_02",
        "1e5",
        "true",
        "null",
        "~",
        "~user/x",
        "a b",
        "lr=1e-4",
        "a,b",
        "Müller",
        "exp(1)",
        "[x]",
    ),
    *("{a}", "a#b", "it's", 'say "x"', "a\\b", "a\\", '\\"', "100%j", "a:b", "$HOME", "-x", "!x", "a|b&c;d"),
]
ENTRIES = [
    *("/hydra/launcher: basic", "override /hydra/sweeper: basic", "/model@hydra.callbacks: tiny", "../../x"),
    *("/model: ${oc.env:SECRET}", "/other: x", "/model: sub/x"),
]


def folder_with(tmp_path: Path, text: str, name: str = "run/theirs.yaml") -> Path:
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return tmp_path / "conf"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert train([*arguments, "--cfg"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name: "a\\n#SBATCH --wrap=evil"\n', "name=a\\n#SBATCH"),
        ('data: {text_field: "a\\x1b[2J"}\n', "data.text_field=a\\x1b"),
        ('name: "a\\u2028b"\n', "LINE SEPARATOR"),
        ('name: "a\\u202eb"\n', "RIGHT-TO-LEFT OVERRIDE"),
        ("name: ${oc.env:SECRET}\n", "line 4: name=${oc.env:SECRET}: only other keys"),
        ("name: ${oc.decode:${oc.env:SECRET}}\n", "only other keys"),
        ("name: a\\${oc.env:SECRET}\n", "only other keys"),
        ("train: {steps: '${oc.env:SECRET}'}\n", "only other keys"),
        ("name: ${now:%S}\n", "only other keys"),
        ("hydra: {callbacks: {x: {_target_: os.system}}}\n", "hydra: a file holds settings of the run alone"),
        ("<<: {hydra: {}}\n", "settings of the run alone"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + "c: [" + ", ".join(["*b"] * 20_000) + "]\n", "its aliases"),
        ("a: &a [*a]\n", "contain itself"),
        ("name: 2024_01_02\n", "YAML takes it for 20240102"),
        ("name: 12:30\n", "YAML takes it for 750"),
        ("name: 1e5\n", 'put it in quotes: "1e5"'),
        ("name: yes\n", "YAML takes it for True"),
        ("name: ~\n", "YAML takes it for nothing"),
        ("name: !!python/object/apply:os.system [ls]\n", "theirs.yaml"),
        ("[1, 2]\n", "is not YAML"),
    ],
)
def test_what_a_run_of_a_stranger_may_not_hold(
    text: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    line = refusal(capsys, "--config-dir", str(folder_with(tmp_path, HEAD + text)), "run=theirs")
    assert says in line
    assert "swordfish" not in line


@pytest.mark.parametrize("entry", ENTRIES)
def test_defaults_name_options_alone(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"# @package _global_\ndefaults:\n  - {entry}\nname: x\n"
    assert "defaults may only name" in refusal(
        capsys, "--config-dir", str(folder_with(tmp_path, text)), "run=theirs"
    )


def test_packages_of_hydra_and_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, "# @package hydra.job\nname: x\n")
    assert "@package hydra.job" in refusal(capsys, "--config-dir", str(folder), "run=theirs")
    folder = folder_with(tmp_path, HEAD)
    folder_with(tmp_path, "x: 1\n", "hydra/launcher/mine.yaml")
    assert "settings of Hydra" in refusal(capsys, "--config-dir", str(folder), "run=theirs")


def test_a_sound_folder_is_read(tmp_path: Path) -> None:
    text = (
        "# @package _global_\n# mine\ndefaults:\n  - demo\n  - override /model: mine\n  - _self_\n"
        "name: '2024_01_02'\nrun_dir: runs/${name}\ndata: {text_field: 7}\n"
    )
    folder = folder_with(tmp_path / "Müller = 1, 2", text)
    folder_with(tmp_path / "Müller = 1, 2", "name: mine\nnum_layers: 1_0\n", "model/mine.yaml")
    config = compose_run(["run=theirs"], [folder])
    assert (config.run_dir, config.data.text_field) == ("runs/2024_01_02", "7")
    assert (config.model.name, config.model.num_layers) == ("mine", 10)


@pytest.mark.parametrize("value", TEXTS)
def test_text_stays_as_it_is_written(value: str) -> None:
    assert compose_run(["run=smoke", f"name=x{value}"]).name == f"x{value}"
    config = compose_run(["run=smoke", f"data.corpus={value}", f"name={quoted(value)}"])
    assert (config.data.corpus, config.name) == (value, value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (f"run_dir=/tmp/{'ü' * 128}", "no file or folder has a name of 256 bytes"),
        (f"checkpoint.load=/tmp/{'x' * 256}/y", "no file or folder"),
        (f"data.corpus={'x' * 256}", "no file or folder"),
        (f"data.text_field={'x' * 2049}", "at most 2048 bytes"),
        ("data.corpus=\udcff", "not UTF-8"),
        ("data.corpus=???", "would become the default"),
        ("data.corpus='???'", "would become the default"),
    ],
)
def test_text_that_no_path_can_be(setting: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "run=smoke", setting)
    assert line.startswith(f"msa-train: error: {setting.partition('=')[0]}=")
    assert says in line
    many = "full," * 60 + "msa"
    assert compose_run(["run=smoke", "model.num_layers=61", f"model.layer_attention={many}"])


def test_text_reaches_the_workers(tmp_path: Path) -> None:
    """Through the file that the launcher writes and they read."""
    config, path = compose_run(["run=smoke"]), tmp_path / "config.yaml"
    numbers = ["12:30", "1_000", "0x10", "0o7", "010", "2024-01-02", ".5", "1.", ".inf", "1e5", "1E+5", "+1"]
    for value in [*TEXTS, *numbers, "on", "=", "<<", "????", "- a", "a: b", " a ", "", "\u00e9" * 90]:
        config.data.corpus = config.data.text_field = value
        path.write_text(config_to_yaml(config), encoding="utf-8")
        assert load_run(path) == config, value


def test_quotes_that_are_written_are_no_part_of_the_text() -> None:
    assert literal("name='a b'") == "name='a b'"
    assert compose_run(["run=smoke", "name='a b'"]).name == "a b"
    assert split_choices("""a,"b,c",'d'""") == ["a", '"b,c"', "'d'"]


def test_text_of_a_cluster(tmp_path: Path) -> None:
    cluster = compose_cluster("local_cpu", ["cluster.account=2024_01", "cluster.network.NCCL_X=010"])
    assert (cluster.account, cluster.network) == ("2024_01", {"NCCL_X": "010"})
    for text, says in (
        ("account: 1_0\n", "YAML takes it for 10"),
        ("environment: {A: on}\n", "YAML takes it for True"),
        ("environment: {A: '${oc.env:SECRET}'}\n", "only other keys"),
        ('partition: "a\\nb"\n', "control characters"),
        ('sbatch: ["--x=a\\nb"]\n', "control characters"),
        ("setup: ['${oc.env:SECRET}']\n", "environment"),
    ):
        folder = folder_with(tmp_path, text, "cluster/mine.yaml")
        with pytest.raises(ValueError, match=says):
            compose_cluster("mine", [], [folder])
    folder = folder_with(tmp_path, "setup: ['echo \\${HOME} $PATH']\n", "cluster/mine.yaml")
    assert compose_cluster("mine", ["cluster.workers_per_node=1"], [folder]).setup == ["echo ${HOME} $PATH"]


def test_a_cluster_of_a_shipped_name_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "account: x\n", "cluster/local_cpu.yaml")
    with pytest.raises(ValueError, match=f"is the name of {folder}.* and of {config_dir()}"):
        compose_cluster("local_cpu", [], [folder])


def test_a_folder_with_clusters_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, "gpus_per_node: 0\nworkers_per_node: 2\n", "cluster/here.yaml")
    arguments = ["run=smoke", "cluster=here", "nodes=1", "time=01:00:00", "--config-dir", str(folder)]
    assert submit([*arguments, "--dry-run"]) == 0
    assert f"--config-dir={folder}" in capsys.readouterr().out
