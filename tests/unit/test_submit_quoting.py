"""What msa-submit writes reaches bash, sbatch and msa-train as it was meant, whatever it is called."""

import subprocess
from pathlib import Path

import pytest

from launchers.hydra_config.compose import compose_run
from launchers.slurm.batch_script import Job, batch_script
from launchers.submit import main
from msa_train.config import ClusterConfig, ContainerRuntime

NAMES = [
    "lr=1e-4",
    "a,b",
    "Müller",
    "exp(1)",
    "a b",
    "100%j",
    "2024_01_02",
    "it's",
    'say "x"',
    "a#b",
    "$HOME",
    "~x",
]
ARGUMENTS = ["run=smoke", "cluster=local_cpu", "nodes=1", "time=01:00:00", "--dry-run"]


def sbatch_arguments(script: str) -> list[str]:
    """Options as sbatch reads them from the head; written from its documentation and source."""
    found: list[str] = []
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        text, word, quote, escaped = line.removeprefix("#SBATCH"), "", "", False
        if text == line:
            continue
        for character in f"{text} ":
            if escaped:
                word, escaped = word + character, False
            elif character == "\\":
                escaped = True
            elif quote:
                word, quote = (word, "") if character == quote else (word + character, quote)
            elif character in "\"'":
                quote = character
            elif character == "#":
                break
            elif character.isspace():
                found += [word] if word else []
                word = ""
            else:
                word += character
        assert not quote, f"unmatched quote: {line}"
    return found


def bash_arguments(script: str) -> list[str]:
    line = next(line for line in script.splitlines() if line.startswith("arguments=("))
    done = subprocess.run(
        ["bash", "-c", f"{line}\nprintf '%s\\0' \"${{arguments[@]}}\""], capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_given", [True, False])
def test_any_folder(
    name: str,
    is_given: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As run_dir, and as the folder that the command is given in."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(tmp_path if is_given else folder)
    run_dir = folder if is_given else folder / "runs" / "smoke"
    assert main([*ARGUMENTS, *([f"run_dir={folder}"] if is_given else [])]) == 0
    script = capsys.readouterr().out
    assert compose_run(bash_arguments(script)).run_dir == str(run_dir)
    # Slurm reads %% as %
    pattern = f"--output={str(run_dir).replace('%', '%%')}/slurm/job-%j.out"
    assert pattern in sbatch_arguments(script)
    (line,) = [line for line in script.splitlines() if line.startswith("run_dir=")]
    shown = subprocess.run(["bash", "-c", f'{line}\nprintf %s "$run_dir"'], capture_output=True, check=True)
    assert shown.stdout.decode() == str(run_dir)


@pytest.mark.parametrize("name", [*NAMES, '" --output=/x "', "\\", "a\\", "'--wrap=ls'", "a b --wrap=ls"])
def test_any_name_is_one_option(name: str) -> None:
    job = Job(
        name=name,
        run_dir=Path("/r"),
        folder=Path("/f"),
        nodes=1,
        time="60",
        arguments=["run=smoke", f"name={name}"],
        python_path="",
    )
    cluster = ClusterConfig(
        account=name, partition=name, qos=name, memory=name, sbatch=["--comment=a b", "--constraint=h100"]
    )
    script = batch_script(job, cluster)
    options = sbatch_arguments(script)
    wanted = [
        f"--job-name={name}",
        f"--partition={name}",
        f"--account={name}",
        f"--qos={name}",
        f"--mem={name}",
    ]
    assert options[:5] == wanted
    assert options[-2:] == ["--comment=a b", "--constraint=h100"]
    assert len(options) == len([line for line in script.splitlines() if line.startswith("#SBATCH")])
    assert bash_arguments(script) == ["run=smoke", f"name={name}"]


def test_folders_that_slurm_or_a_container_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "run_dir=/x/a\\b"]) == 2
    assert "run_dir=/x/a\\b: Slurm drops every \\" in capsys.readouterr().err
    for runtime in ContainerRuntime:
        container = ["cluster.container=/i.sqsh", f"cluster.container_runtime={runtime.value}"]
        assert main([*ARGUMENTS, "run_dir=/x/a,b", *container]) == 2
        assert "/x/a,b: a folder with , or :" in capsys.readouterr().err
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    assert main(ARGUMENTS) == 2
    assert "must hold no control characters" in capsys.readouterr().err
