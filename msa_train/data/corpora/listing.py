"""List the paths of a corpus: folders walked, globs expanded. Folders of runs and caches are no data.

Python's own glob follows circles of links until the system stops it, passes over folders that it may not
read, and takes `data[1]/*.txt` for a class of characters although there is a folder of that name.

Cost: one scandir per folder, whose names are sorted, and a stat per folder; all paths are in memory.
"""

import fnmatch
import glob
import os
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from msa_train.data.errors import corpus_error, unreadable

# Every start of a run leaves it in its run_dir, see runtime/fencing.py.
RUN_MARK = ".generation"
TAG_NAME = "CACHEDIR.TAG"
TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# tokenized corpora of msa_train\n"
WHOLE_FOLDER = ("**", "*")
_HUB_FOLDERS = {"blobs", "refs", "snapshots"}
_TAG_BYTES = _REF_BYTES = 1 << 10


@dataclass(slots=True)
class Listing:
    """Hold what a search has found."""

    paths: list[str] = field(default_factory=list[str])
    "files, links to files included"
    left_out: list[str] = field(default_factory=list[str])
    "folders of runs and caches, which were not entered"


def split_glob(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """Split a glob into a folder and the parts below it that are patterns.

    A part that exists by its very name is no pattern. Example: /data/*/a.txt -> /data and ("*", "a.txt"),
    /data/** -> /data and ("**", "*").
    """
    root, parts = Path(pattern.anchor), list(pattern.relative_to(pattern.anchor).parts)
    while len(parts) > 1 and (not glob.has_magic(parts[0]) or os.path.lexists(root / parts[0])):
        root /= parts.pop(0)
    if parts[-1] == "**":
        parts.append("*")
    return root, tuple(part for i, part in enumerate(parts) if parts[i : i + 2] != ["**", "**"])


def file_number(path: str | Path, status: os.stat_result) -> Hashable:
    """Identify a file or folder, the same by all paths to it. Some network file systems number all 0."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def list_files(corpus: str, root: Path, parts: tuple[str, ...], own: Collection[str]) -> Listing:
    """List all files below `root` that match, hidden names only where the pattern has the dot.

    Links to folders are followed, for corpora are often put together from them; each folder is entered once.

    Args:
        corpus: the setting, for messages.
        root: where to begin.
        parts: patterns of the names on the way; `**` stands for any number of folders.
        own: folders that are no data besides those that are marked; they need not exist.

    Example: files a/x.txt, a/b/y.txt, a/.k.txt, .h/z.txt and a folder run/ of a run: parts ("**", "*.txt") ->
    a/x.txt and a/b/y.txt, ("*", "*.txt") -> a/x.txt; run/ is left out of both.

    Raises:
        ValueError: if a folder cannot be read, or `root` itself belongs to a run or a cache.
    """
    listing = Listing()
    if not root.is_dir():
        return listing
    not_data = {number for folder in own if (number := _number(folder)) is not None}
    # a folder may be entered once for each number of parts that are left: `**/a/*` may meet `a` in two ways
    seen: set[tuple[Hashable, int]] = set()
    # a stack of our own: folders may be nested deeper than Python's calls
    waiting = [(str(root), parts)]
    while waiting:
        folder, left = waiting.pop()
        number = _number(folder)
        if (number, len(left)) in seen:
            continue
        seen.add((number, len(left)))
        entries = _entries(corpus, folder)
        if number in not_data or _is_of_a_run_or_cache(entries):
            if folder == str(root):
                raise corpus_error(
                    corpus,
                    f"{folder} is the folder of a run or a cache, whose files are no text to train on; "
                    "use another run_dir or data.cache_dir, or move the text",
                )
            listing.left_out.append(folder)
            continue
        # reversed: the stack then gives folders in the order of their names
        waiting += reversed(list(_visit(corpus, folder, entries, left, listing)))
    return listing


def _visit(
    corpus: str, folder: str, entries: dict[str, os.DirEntry[str]], parts: tuple[str, ...], listing: Listing
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Note the files of one folder that match; returns folders to enter, with the parts left for them."""
    deep = parts[0] == "**"
    if deep and entries.keys() >= _HUB_FOLDERS:
        yield _hub_snapshot(corpus, folder), parts
        return
    if deep:
        # `**` stands for one more folder, or for none: then the next part is matched here
        for name, entry in entries.items():
            if not name.startswith(".") and _is_dir(entry):
                yield entry.path, parts
        parts = parts[1:]
    part, rest = parts[0], parts[1:]
    for name, entry in entries.items():
        # as in a shell: `*` does not match a name with a dot in front
        hidden = name.startswith(".") and not part.startswith(".")
        if name != part and (hidden or not fnmatch.fnmatchcase(name, part)):
            continue
        if not _is_dir(entry):
            if not rest:
                listing.paths.append(entry.path)
        elif rest:
            yield entry.path, rest


def _number(folder: str) -> Hashable:
    """Identify a folder; None where there is none, or nothing can be said about it."""
    try:
        return file_number(folder, os.stat(folder))
    except OSError:
        return None


def _entries(corpus: str, folder: str) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}
    except OSError as error:
        raise unreadable(corpus, folder, error) from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # such as a link to itself: whoever looks at the file says so
        return False


def _is_of_a_run_or_cache(entries: dict[str, os.DirEntry[str]]) -> bool:
    if RUN_MARK in entries:
        return True
    try:
        return TAG_NAME in entries and _begin(entries[TAG_NAME].path, _TAG_BYTES) == TAG_TEXT
    except OSError:
        return False


def _hub_snapshot(corpus: str, folder: str) -> str:
    """Find a data set's files in Hugging Face's cache: blobs hold them once more, refs name revisions."""
    snapshots = os.path.join(folder, "snapshots")
    revisions = [name for name, entry in _entries(corpus, snapshots).items() if _is_dir(entry)]
    try:
        current = _begin(os.path.join(folder, "refs", "main"), _REF_BYTES).strip()
    except OSError:
        current = ""
    # refs/main names the current revision; a single one needs no name
    if current not in revisions and len(revisions) != 1:
        raise corpus_error(
            corpus,
            f"{snapshots} holds {len(revisions)} revisions and refs/main names none; give the folder of one",
        )
    return os.path.join(snapshots, current if current in revisions else revisions[0])


def _begin(path: str, count: int) -> str:
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as stream:
        return stream.read(count).decode("ascii", "replace")
