"""Which files a corpus consists of, before any of them is read."""

import glob
import hashlib
import json
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
INDEXED_SUFFIXES = (".bin", ".idx")

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(slots=True)
class SourceFile:
    """A file as it was when the corpus was listed."""

    path: str
    name: str
    "path below the corpus' root, so that moving a corpus renames no document"
    document: str
    "name of the document that it is, or becomes part of"
    size: int
    mtime_ns: int

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document."""
        return self.name.endswith(JSONL_SUFFIXES)


@dataclass(slots=True)
class Source:
    """The files of a corpus, sorted by document and name."""

    corpus: str
    "the setting, for messages"
    description: str
    files: list[SourceFile]
    is_stdlib: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the files on disk."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Hash of every file's path, size and time of change."""
        rows = [(file.path, file.document, file.size, file.mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest()


def corpus_error(corpus: str, problem: str) -> ValueError:
    """The one line that reports a bad corpus."""
    return ValueError(f"data.corpus={corpus}: {problem}")


def find_indexed(corpus: str) -> str | None:
    """Prefix of the Megatron .bin/.idx pair that the setting names, or None if it names none.

    Raises:
        ValueError: if one file of the pair is missing.
    """
    path = os.path.expanduser(corpus)
    prefix = path[:-4] if path.endswith(INDEXED_SUFFIXES) else path
    found = [suffix for suffix in INDEXED_SUFFIXES if os.path.isfile(prefix + suffix)]
    if prefix == path and (not found or os.path.exists(path)):
        return None
    if not found:
        raise corpus_error(corpus, f"there is neither {prefix}.bin nor {prefix}.idx; correct the path")
    if len(found) == 1:
        missing = ".idx" if found == [".bin"] else ".bin"
        raise corpus_error(corpus, f"{prefix}{missing} is missing beside the {found[0]}; both are needed")
    return prefix


def find_source(corpus: str) -> Source:
    """List the files of a corpus of text.

    'stdlib' is the running Python's standard library. Otherwise a file, a glob (`**` goes into folders), or a
    folder, of which everything is taken apart from hidden files and folders.

    Raises:
        ValueError: if there is nothing, or something that cannot be a text.
    """
    if corpus == "stdlib":
        return _stdlib()
    path = Path(corpus).expanduser()
    if path.is_dir():
        root, paths, kind = path, list(_walk(corpus, path)), "folder"
    elif path.exists():
        root, paths, kind = path.parent, [path], "file"
    elif glob.has_magic(corpus):
        root, kind = _glob_root(path), "glob"
        paths = [Path(found) for found in glob.iglob(str(path), recursive=True)]
        paths = [found for found in dict.fromkeys(paths) if not found.is_dir()]
    else:
        raise corpus_error(corpus, "does not exist; give a file, folder or glob, or 'stdlib'")
    if not paths:
        what = "holds no file that is not hidden" if kind == "folder" else "matches no file"
        raise corpus_error(corpus, f"{what}; give another path")
    files = [_source_file(corpus, file, root) for file in paths]
    files.sort(key=lambda file: file.name)
    return Source(corpus, f"{len(files)} file(s) of {kind} {corpus}", files)


def _source_file(corpus: str, path: Path, root: Path, document: str = "") -> SourceFile:
    if path.suffix in INDEXED_SUFFIXES:
        raise corpus_error(corpus, f"{path} is a .bin or .idx; give the prefix of one .bin/.idx pair instead")
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(corpus, str(path), error) from error
    if not stat.S_ISREG(status.st_mode):
        raise corpus_error(
            corpus, f"{path} is not a regular file; remove it or use a glob that leaves it out"
        )
    name = path.relative_to(root).as_posix()
    # Surrogates stand for bytes of a file name that are not UTF-8; JSON and hashes want text.
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return SourceFile(str(path.absolute()), name, document or name, status.st_size, status.st_mtime_ns)


def unreadable(corpus: str, place: str, error: Exception) -> ValueError:
    """The one line that reports a file which the system, or a decompressor, cannot read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return corpus_error(corpus, f"{place} cannot be read ({reason}); repair it or leave it out")


def _walk(corpus: str, root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise unreadable(corpus, str(error.filename), error)

    # Links to folders are followed, for corpora are often put together from them; `seen` ends their circles.
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _glob_root(pattern: Path) -> Path:
    fixed = [part for part in pattern.parents if not glob.has_magic(str(part))]
    return fixed[0]


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_STDLIB)
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            document = _stdlib_document(PurePosixPath(path.relative_to(root).as_posix()))
            files.append(_source_file("stdlib", path, root, document))
    if not files:
        raise corpus_error("stdlib", f"no .py file below {root}; give a file, folder or glob of your own")
    files.sort(key=lambda file: (file.document, file.name))
    version = platform.python_version()
    return Source(
        "stdlib", f"standard library of Python {version}, {len(files)} files", files, is_stdlib=True
    )


def _stdlib_document(path: PurePosixPath) -> str:
    """Name of the document that a file of the standard library belongs to.

    A package is one document. Modules outside packages are put together by first letter, and so are those of
    the package `test`, whose sub-packages are documents of their own. Examples: asyncio/tasks.py -> asyncio,
    abc.py -> modules/a, test/test_bool.py -> test/modules/b, test/test_json/test_dump.py -> test/test_json.
    """
    package = path.parts[:-1]
    if not package or package == ("test",):
        letter = path.name.removeprefix("test_").lstrip("_")[:1].lower()
        return "/".join((*package, "modules", letter))
    return "/".join(package[: 2 if package[0] == "test" else 1])
