"""Reads the pages of the documentation: links, headings, commands, names of files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(msa-[a-z]+|\./run\.sh|pytest|python3?|pip)(\s|$)")
_VARIABLE = re.compile(r"[A-Z_]+=\S*\s+")
# a hanging line of output or code is no command, whatever its first word
_PROMPT = "$ "


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page. words: without the prompt, comments and variables that are set for it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """All pages that a user or a developer reads."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    for folder in ("slurm", "tests", "kernels", "benchmarks"):
        found += ROOT.glob(f"{folder}/**/README.md")
    return sorted(found)


def name_of(page: Path) -> str:
    """Path from the root of the project."""
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of all links, e.g. "see [x](y.md#z)" -> ["y.md#z"]."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text)))


def anchors(text: str) -> set[str]:
    """What can stand behind a # of a link: "## What is `x`?" -> "what-is-x"; a second one gets "-1"."""
    found: set[str] = set()
    for line in prose(text).splitlines():
        if match := re.match(r"#+ (.*)", line):
            slug = re.sub(r"[^\w\- ]", "", match[1].lower()).replace(" ", "-")
            number = 1
            while slug in found:
                slug, number = f"{slug.removesuffix(f'-{number - 1}')}-{number}", number + 1
            found.add(slug)
    return found


def code_spans(text: str) -> list[str]:
    """What stands between single backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(page: Path) -> Iterator[Command]:
    """Commands in fenced blocks: lines after "$ " where a block has one, else lines that begin with one."""
    text = page.read_text(encoding="utf-8")
    for block in _FENCE.findall(text):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        if any(line.startswith(_PROMPT) for line in lines):
            lines = [line.removeprefix(_PROMPT) for line in lines if line.startswith(_PROMPT)]
        for line in lines:
            line = _VARIABLE.sub("", line) if _VARIABLE.match(line) else line
            if _COMMAND.match(line):
                yield Command(name_of(page), tuple(shlex.split(line, comments=True)))


def unfenced_commands(text: str) -> list[str]:
    """Lines of indented blocks that begin with a command of ours: nothing would try them."""
    return re.findall(r"^ {4,}((?:msa-[a-z]+|\./run\.sh) .*)$", prose(text), re.MULTILINE)


def files_of_project() -> set[str]:
    """Paths of all files that can be named, from the root."""
    tops = [
        "msa_train",
        "launchers",
        "kernels",
        "conf",
        "tests",
        "slurm",
        "benchmarks",
        "docs",
        "constraints",
    ]
    found = {name_of(path) for top in tops for path in (ROOT / top).rglob("*") if path.is_file()}
    return found | {name_of(path) for path in ROOT.iterdir() if path.is_file()}
