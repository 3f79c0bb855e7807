"""Print pages of docs/ from the code they describe: `python -m launchers.cli.documentation PAGE`.

A table that is written by hand goes out of date. docs/configuration.md is what this module prints, and
`tests/unit/test_docs.py` compares the two. Repeat after a change of msa_train/config or conf/:

    python -m launchers.cli.documentation configuration > docs/configuration.md
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from launchers.cli.command_line import Parser, run_command
from launchers.cli.output import say
from launchers.hydra_config.options import CLUSTER, OPTION_GROUPS, group_options
from msa_train.config import AlternateConfig, RunConfig, StageConfig, StageParallelConfig
from msa_train.config.cluster import ClusterConfig

INTRODUCTION = """\
# Configuration

This page is printed by `python -m launchers.cli.documentation configuration`; do not edit it.

A run is put together from one option of every group and from single values:

```
msa-train run=demo exchange=frugal train.steps=50
```

- First come the defaults below, then the chosen option of each group (a file of `conf/GROUP`), then the run
  (`conf/run`), then what stands on the command line. So a run may differ from the defaults below.
- `msa-train run=demo --cfg` prints every key with its value, `msa-train run=demo --cfg=train.steps` one of
  them, for scripts. `--check` checks all of it, the corpus and the checkpoint included, prints one line and
  starts nothing.
- Text is taken as it is written (`name=2024_01_02`). So is text with commas:
  `model.layer_attention=full,swa*2,msa`. `${key}` stands for another key; nothing else is looked up.
- Sizes that do not fit, a misspelt key or a missing file are answered by one line and exit code 2 before
  anything starts. The line names the value, the rule and the fix.
- `--config-dir DIR` adds options of your own, from `DIR/run`, `DIR/model` and so on. It may be repeated.

`KV block` and other terms are explained in the [glossary](glossary.md)."""

STAGES = """\
By name under `stages`, in order: `stages.dense_warmup.tokens=500000`. See [stages](stages.md)."""
CLUSTER_KEYS = """\
One file of `conf/cluster`, chosen by `msa-submit cluster=NAME`; `cluster.KEY=VALUE` changes one key. Nothing
in it changes what is computed. See [slurm/README.md](../slurm/README.md)."""


def configuration_page() -> str:
    """Write the text of docs/configuration.md."""
    sections = [INTRODUCTION, _groups(), *_sections()]
    sections += [
        f"## stages.NAME\n\n{STAGES}\n\n{_table(StageConfig, 'stages.NAME.')}",
        _part_of_stages("parallel", StageParallelConfig),
        _part_of_stages("alternate", AlternateConfig),
        f"## {CLUSTER}\n\n{CLUSTER_KEYS}\n\n{_table(ClusterConfig, f'{CLUSTER}.')}",
    ]
    return "\n\n".join(sections) + "\n"


def _part_of_stages(name: str, part: type[Any]) -> str:
    """Write the section of the keys `stages.NAME.PART.KEY`."""
    place = f"stages.NAME.{name}"
    return f"## {place}\n\n{_cell(inspect.getdoc(part) or '')}\n\n{_table(part, f'{place}.')}"


PAGES: dict[str, Callable[[], str]] = {"configuration": configuration_page}


def _groups() -> str:
    """Write the table of groups: every file of conf/ with the first comment in it."""
    rows: list[str] = []
    for group in (*OPTION_GROUPS, CLUSTER):
        options = group_options(group)
        # a row for each run, which people choose among; small groups in a row each, for a page is short
        apart = group == "run"
        told = [f"`{name}`: {_cell(text)}" if text else f"`{name}`" for name, text in options.items()]
        rows += [f"| `{group}` | {cell} |" for cell in (told if apart else ["; ".join(told)])]
    return "\n".join(["## Groups and their options", "", "| group | options |", "|---|---|", *rows])


def _sections() -> Iterator[str]:
    """Write the run's own keys, then a section for each part of it."""
    yield f"## The run\n\n{_table(RunConfig, '')}"
    hints = get_type_hints(RunConfig)
    for part in fields(RunConfig):
        if is_dataclass(hints[part.name]):
            config: Any = hints[part.name]
            summary = _cell(inspect.getdoc(config) or "")
            yield f"## {part.name}\n\n{summary}\n\n{_table(config, f'{part.name}.')}"


def _table(config: type[Any], prefix: str) -> str:
    """Write the keys of one dataclass that hold a value; parts have a section of their own."""
    hints, strings = get_type_hints(config), field_strings(config)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for part in fields(config):
        if is_dataclass(hints[part.name]) or hints[part.name] == dict[str, StageConfig]:
            continue
        meaning = "; ".join(filter(None, [strings.get(part.name, ""), _choices(hints[part.name])]))
        rows.append(f"| `{prefix}{part.name}` | {_default(part)} | {_cell(meaning)} |")
    return "\n".join(rows)


def field_strings(config: type[Any]) -> dict[str, str]:
    """Read the string under each field; Python keeps none of them, so they come from the source.

    Example: a class body of `steps: int = 1` and `"of the run"` -> {"steps": "of the run"}.
    """
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef), "the source of a class is a class"
    found, name = {}, ""
    # a string belongs to the field right above it; anything between them, and it belongs to none
    for line in definition.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id
        elif name and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            found[name], name = str(line.value.value), ""
        else:
            name = ""
    return found


def _choices(kind: Any) -> str:
    """Say what each choice stands for, by the comments behind the members of an Enum.

    Example: members `bf16 = "bf16"  # 2 bytes` and `fp32 = "fp32"` -> "`bf16`: 2 bytes; `fp32`".
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return ""
    comments: dict[str, str] = {}
    for line in inspect.getsource(kind).splitlines():
        name, _, rest = line.strip().partition(" = ")
        if name in kind.__members__:
            comments[name] = rest.partition("  # ")[2]
    return "; ".join(f"`{name}`: {text}" if text else f"`{name}`" for name, text in comments.items())


def _default(part: Field[Any]) -> str:
    """Write a default as it stands on a command line: true, not True; the value of a choice."""
    value = part.default if part.default is not MISSING else part.default_factory()  # type: ignore[misc]
    if isinstance(value, Enum):
        value = value.value
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def _cell(text: str) -> str:
    """Fit a text into a cell of a Markdown table: one line, with every | escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a page.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input.
    """

    def run() -> None:
        parser = Parser(prog="python -m launchers.cli.documentation", description="Prints a page of docs/.")
        parser.add_argument("page", choices=sorted(PAGES))
        say(PAGES[parser.parse_args(argv).page](), lines=True, end="")

    return run_command(Path(__file__).stem, run)


if __name__ == "__main__":
    sys.exit(main())
