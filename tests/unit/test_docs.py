"""The documentation says what is so: links, files, keys and commands exist, and printed pages are fresh."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from launchers import checkpoint, convert, data, evaluate, plan, preflight, simulate, status, submit, train
from launchers.cli.documentation import configuration_page
from launchers.cli.simulate_arguments import read_question
from launchers.hydra_config.compose import compose_run, known_keys
from launchers.hydra_config.imported_options import write_conf
from msa_train.config.cluster import ClusterConfig
from msa_train.config.evaluation.rules import check_evaluation
from msa_train.data.token_cache.store import write_store
from tests.helpers import worked_example
from tests.helpers.byte_tokenizer import byte_tokenizer_json
from tests.helpers.doc_pages import (
    ROOT,
    Command,
    anchors,
    code_spans,
    commands,
    files_of_project,
    links,
    name_of,
    pages,
    prose,
    unfenced_commands,
)

PAGES = pages()
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
PROGRAMS = re.findall(r"^(msa-[a-z]+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
FOLDERS = r"(?:msa_train|launchers|kernels|conf|tests|slurm|benchmarks|docs|constraints)"
NO_KEYS, NOT_OURS = {"data.json"}, {"random.py"}
MAX_README_LINES, MAX_PAGE_LINES = 120, 400
TEXT = "\n".join(f"Line {number} of a document that is long enough to train on." for number in range(60))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(read(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(read(target)), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    files, text = files_of_project(), read(page)
    for name in re.findall(rf"(?<![\w/.-]){FOLDERS}/[\w./-]+", re.sub(r"\]\([^)]*\)", "", text)):
        name = name.rstrip("./")
        if any(part.isupper() for part in re.split(r"[/.]", name)):
            continue  # cluster/NAME.yaml
        candidates = [folder / suffix for folder in (ROOT, page.parent) for suffix in (name, f"{name}.py")]
        assert any(path.exists() for path in candidates), name
    for name in code_spans(text):
        if re.fullmatch(r"[\w./-]+\.py", name) and name not in NOT_OURS:
            assert any(f"/{path}".endswith(f"/{name}") for path in files), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_programs_that_are_named_exist(page: Path) -> None:
    keys = {*known_keys(), *(f"cluster.{name}" for name in ClusterConfig.__dataclass_fields__)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for span in code_spans(read(page)):
        for key in re.findall(r"(?<![\w./-])([a-z_]+\.[a-z0-9_]+)(?![\w./(])", span):
            if key.partition(".")[0] in sections and key not in NO_KEYS:
                assert key in keys, span
        if (match := re.match(r"(msa-[a-z]+)( |$)", span)) is not None:
            assert match[1] in PROGRAMS, span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short_and_plain(page: Path) -> None:
    text = read(page)
    assert len(text.splitlines()) <= MAX_PAGE_LINES
    assert "\u2014" not in text
    assert not unfenced_commands(text)
    assert text.count("```") % 2 == 0


def test_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def test_readme_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in links(read(ROOT / "README.md"))}
    assert linked >= {name_of(page) for page in PAGES if page.parent in (ROOT / "docs", ROOT / "slurm")}


def test_configuration_page_is_what_is_printed() -> None:
    fresh = "python -m launchers.cli.documentation configuration > docs/configuration.md"
    assert read(ROOT / "docs/configuration.md") == configuration_page(), f"repeat: {fresh}"


def test_every_key_is_explained() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", configuration_page(), re.MULTILINE)
    explained = {key for key, meaning in rows if meaning}
    assert explained >= set(known_keys())


def test_worked_example_is_computed() -> None:
    assert worked_example.text() in read(ROOT / "docs/context_parallelism.md")
    example = worked_example.Example()
    out, dk, dv = example.one_process()
    torch.testing.assert_close(torch.cat(example.out).flatten(), out.flatten())
    grads = torch.cat(example.grad)
    torch.testing.assert_close(grads[:, 0].flatten(), dk.flatten())
    torch.testing.assert_close(grads[:, 1].flatten(), dv.flatten())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands of the pages read; /data of the pages is its data/."""
    folder = tmp_path_factory.mktemp("docs")
    notes = folder / "data/notes"
    notes.mkdir(parents=True)
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"{number}\n{TEXT}")
    lines = "".join(json.dumps({"text": TEXT, "content": f"{i} {TEXT}"}) + "\n" for i in range(40))
    (folder / "corpus.jsonl").write_text(lines)
    zstandard = pytest.importorskip("zstandard")
    (folder / "corpus.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    tokens = [np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.int32) for _ in range(40)]
    write_store(str(folder / "data/megatron_text_document"), tokens, vocab_size=256)
    byte_tokenizer_json(folder).rename(folder / "tokenizer.json")
    config = compose_run(["run=smoke"])
    write_conf(
        folder / "runs/m3",
        config.model,
        config.attention,
        tokenizer=folder / "tokenizer.json",
        source="a model",
    )
    yaml = re.search(r"```yaml\n(.*?)```", read(ROOT / "slurm/README.md"), re.DOTALL)
    assert yaml is not None, "slurm/README.md shows a cluster's file"
    for name, lengths in (("first", "1K"), ("longer", "2K,10K")):
        request = ["synthesize", "--lengths", lengths, "--documents", "6"]
        assert data.main([*request, "--output", str(folder / "runs/recall" / name)]) == 0
    (folder / "mine/cluster").mkdir(parents=True)
    (folder / "mine/cluster/here.yaml").write_text(re.sub("^ +", "", yaml[1], flags=re.MULTILINE))
    return folder


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = dict(os.environ)
    monkeypatch.chdir(world)
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: 0)
    # the run that a command starts from was not made here
    monkeypatch.setattr("msa_train.checkpoint.find.find_to_resume", lambda _config: None)
    yield world
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_accepted(command: Command, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = [word.replace("=/data/", f"={inside}/data/") for word in command.words]
    code = TRIALS[program](words)
    assert not code, capsys.readouterr().err


def try_train(words: list[str]) -> int:
    """All checks, on a small corpus where the page's is this Python's."""
    if any(word.startswith(("--help", "--version", "--cfg")) for word in words):
        return train.main(words)
    given = {word.partition("=")[0] for word in words}
    words += [] if "data.corpus" in given else ["data.corpus=data/notes"]
    return train.main([*words, "data.cache_dir=cache", *([] if "--check" in given else ["--check"])])


def try_eval(words: list[str]) -> int:
    """The settings are composed; there is no checkpoint, and nobody looks for one."""
    config = evaluate.of_evaluation(compose_run(words))
    check_evaluation(config)
    return 0


def try_run_sh(words: list[str]) -> int:
    match words:
        case []:
            return try_train(["run=demo"])
        case ["test", *rest]:
            return try_pytest(rest)
        case _:
            return try_train([word for word in words if word != "--system"])


def try_submit(words: list[str]) -> int:
    """Prints the script; of a sweep that of the first combination."""
    sweep = "-m" in words
    words = [word.partition(",")[0] if sweep else word for word in words if word not in ("-m", "--dry-run")]
    return submit.main([*words, "--dry-run"])


def try_simulate(words: list[str]) -> int:
    arguments = simulate._parser().parse_args(words)
    if arguments.command in ("run", "scale") and arguments.selections is None:
        read_question(arguments)
    return 0


def try_plan(words: list[str]) -> int:
    """The arguments are read and the settings composed; nothing is traced or searched."""
    arguments = plan._parser().parse_intermixed_args(words)
    compose_run([*arguments.settings, *([] if "run=" in " ".join(words) else [f"run={plan.SEARCH_RUN}"])])
    return 0


def try_status(words: list[str]) -> int:
    # what msa-submit leaves
    (Path(words[0]) / "slurm").mkdir(parents=True, exist_ok=True)
    return status.main(words)


def try_pytest(words: list[str]) -> int:
    """Paths exist, markers are known."""
    for word in words:
        assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), word
    if "-m" in words:
        assert f'"{words[words.index("-m") + 1]}:' in (ROOT / "pyproject.toml").read_text()
    return 0


def try_python(words: list[str]) -> int:
    """The module or file exists and knows the options."""
    name = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
    source = read(ROOT / name)
    package = "".join(read(path) for path in (ROOT / name).parent.glob("*.py"))
    for word in words[1:]:
        option = word.partition("=")[0]
        assert not option.startswith("--") or option == "--help" or f'"{option}"' in source + package, option
    return 0


def try_pip(words: list[str]) -> int:
    assert (ROOT / words[-1] / "pyproject.toml").exists()
    return 0


def parsed_by(parser: Callable[[], object]) -> Callable[[list[str]], int]:
    """For commands that need what only a run leaves behind: the arguments are read, nothing is done."""

    def attempt(words: list[str]) -> int:
        parser().parse_args(words)  # type: ignore[attr-defined]
        return 0

    return attempt


TRIALS: dict[str, Callable[[list[str]], int]] = {
    "./run.sh": try_run_sh,
    "msa-train": try_train,
    "msa-eval": try_eval,
    "msa-submit": try_submit,
    "msa-simulate": try_simulate,
    "msa-plan": try_plan,
    "msa-status": try_status,
    "msa-convert": parsed_by(convert._parser),
    "msa-checkpoint": parsed_by(checkpoint._parser),
    "msa-data": parsed_by(data._parser),
    "msa-preflight": parsed_by(preflight._parser),
    "pytest": try_pytest,
    "python": try_python,
    "pip": try_pip,
}


def test_reading_of_pages() -> None:
    text = "# A `b`?\n## C\n## C\n```\n[no](x.md)\n```\nsee [y](z.md#c-1), `[no](w.md)`\n"
    assert anchors(text) == {"a-b", "c", "c-1"}
    assert links(text) == ["z.md#c-1"]
    assert "no](x" not in prose(text)
    assert len(COMMANDS) > 50
