"""Read RULER's own wording from a user's clone of its repository, executing none of it.

Read are scripts/data/synthetic/constants.py (`TASKS`: template and answer_prefix of each family) and niah.py
(`needle`, and the noise in `haystack`). Both are parsed to a syntax tree of which constants alone are taken.
"""

import ast
import hashlib
from pathlib import Path
from typing import Any

from msa_train.evaluation.text.wording import Frame, Wording
from msa_train.runtime.untrusted_files import read_limited

NAME = "ruler"
_FOLDERS = ("scripts/data/synthetic", "data/synthetic", "synthetic", ".")
_MAX_BYTES = 1 << 20
# names of the families there, and ours
_FAMILIES = {
    "niah": "niah",
    "variable_tracking": "variables",
    "common_words_extraction": "common",
    "freq_words_extraction": "frequent",
    "qa": "qa",
}


def load_wording(path: str) -> Wording:
    """Read the wording in a clone of the benchmark; our own where no path is given.

    Raises:
        ValueError: if it is not there or not of the form that is known.
    """
    if not path:
        return Wording()
    folder = _find(path)
    try:
        constants = read_limited(folder / "constants.py", _MAX_BYTES)
        needles = read_limited(folder / "niah.py", _MAX_BYTES)
        tasks = _tasks(constants)
        frames = {ours: _frame(tasks, theirs) for theirs, ours in _FAMILIES.items()}
        texts = _texts(needles)
        needle, noise = _one(texts, "needle"), _one(texts, "haystack")
    except OSError as error:
        raise _refused(path, f"{error.filename} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _refused(path, str(error)) from error
    wording = Wording(
        name=NAME,
        digest=hashlib.sha256(constants + needles).hexdigest()[:16],
        needle=needle,
        noise=noise,
        assignment=("VAR {name} = {value}", "VAR {name} = VAR {source} "),
        is_official=True,
        **frames,
    )
    _try_out(wording, path)
    return wording


def _find(path: str) -> Path:
    root = Path(path).expanduser()
    for folder in _FOLDERS:
        if (root / folder / "constants.py").is_file():
            return root / folder
    raise _refused(path, "has no scripts/data/synthetic/constants.py")


def _refused(path: str, reason: str) -> ValueError:
    return ValueError(
        f"evaluation.templates={path}: {reason}; give a clone of NVIDIA/RULER, or none for our wording"
    )


def _tree(content: bytes) -> ast.Module:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is no Python ({type(error).__name__})") from error


def _tasks(content: bytes) -> dict[str, Any]:
    """Take the value of `TASKS = {...}`, which must be written out."""
    for node in _tree(content).body:
        if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["TASKS"]:
            try:
                tasks = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
                raise ValueError("TASKS in constants.py is not written out") from error
            if isinstance(tasks, dict):
                return tasks
    raise ValueError("constants.py has no TASKS")


def _frame(tasks: dict[str, Any], name: str) -> Frame:
    task = tasks.get(name)
    texts = [task.get(key) for key in ("template", "answer_prefix")] if isinstance(task, dict) else []
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"TASKS in constants.py has no template and answer_prefix of {name}")
    template, prefix = (str(text) for text in texts)
    if template.count("{context}") != 1:
        raise ValueError(f"the template of {name} has no {{context}}")
    return Frame(template, prefix)


def _texts(content: bytes) -> dict[str, list[str]]:
    """Collect the texts that names are set to anywhere in a module, in order."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(_tree(content)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                found.setdefault(target.id, []).append(node.value.value)
    return found


def _one(texts: dict[str, list[str]], name: str) -> str:
    if not texts.get(name):
        raise ValueError(f"niah.py sets no {name}")
    return texts[name][0]


def _try_out(wording: Wording, path: str) -> None:
    """Fill in every field once, so that an unknown one is told before anything starts."""
    try:
        wording.niah_parts("numbers", "a", single=True)
        wording.needle_text("numbers", "a", "1")
        wording.variables.parts(query="1", num_v="5")
        wording.common.parts()
        wording.frequent.parts()
        wording.qa.parts(query="a")
    except ValueError as error:
        raise _refused(path, str(error)) from error
