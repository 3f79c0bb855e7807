"""Find the files that a corpus consists of, before any of them is read."""

import glob
import hashlib
import json
import os
import platform
import stat
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from msa_train.data.corpora.listing import WHOLE_FOLDER, Listing, file_number, list_files, split_glob
from msa_train.data.errors import corpus_error, unreadable

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
"files of these names hold a record in each line, whatever the case of the letters"
PACKED_SUFFIXES = ("", ".gz", ".zst")
INDEXED_SUFFIXES = (".bin", ".idx")

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(slots=True)
class SourceFile:
    """Describe a file as it was when the corpus was listed."""

    path: str
    "absolute"
    name: str
    "path below the corpus' root, so that moving a corpus renames no document"
    document: str
    "name of the document that it is, or becomes part of"
    size: int
    "bytes on disk"
    mtime_ns: int
    "time of the last change of content, nanoseconds since 1970"
    ctime_ns: int
    "of the last change of content or owner; unlike mtime_ns, copying tools cannot set it back"
    identity: tuple[object, ...]
    "the same for all paths to one file"

    @property
    def is_jsonl(self) -> bool:
        """Tell if each line is a document, by the name's ending: a.jsonl, b.JSON.gz, not c.txt."""
        endings = tuple(kind + packed for kind in RECORD_SUFFIXES for packed in PACKED_SUFFIXES)
        return self.name.lower().endswith(endings)


@dataclass(slots=True)
class Source:
    """Hold the files of a corpus, sorted by document and name."""

    corpus: str
    "the setting, for messages"
    description: str
    "one line for the log"
    files: list[SourceFile]
    "each file once"
    is_stdlib: bool = False
    "the corpus is Python's standard library, whose files are joined to documents"

    @property
    def num_bytes(self) -> int:
        """Return the size of the files on disk, bytes."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Hash every file's path, size and times of change (SHA-256, hexadecimal); no content is read."""
        rows = [(f.path, f.document, f.size, f.mtime_ns, f.ctime_ns) for f in self.files]
        return hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest()


def find_indexed(corpus: str) -> str | None:
    """Return the prefix of the Megatron .bin/.idx pair that the setting names, or None if it names none.

    Example: data/books.bin or data/books -> data/books, where books.bin and books.idx exist.

    Raises:
        ValueError: if one file of the pair is missing.
    """
    # a name with suffix asks for a pair in any case; one without only if no file or folder has that very name
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


def find_source(corpus: str, own: Collection[str] = ()) -> Source:
    """List the files of a corpus of text.

    'stdlib' is the running Python's standard library. Otherwise a file, a glob (`**` goes into folders), or a
    folder, of which everything is taken apart from hidden files and folders. A file that is found by several
    paths counts once. Folders of runs and caches are left out.

    Args:
        corpus: the setting.
        own: folders of this run (run_dir, data.cache_dir), which need not exist.

    Raises:
        ValueError: if there is nothing, or something that cannot be a text.
    """
    if corpus == "stdlib":
        return _stdlib()
    path = Path(corpus).expanduser()
    # what exists by its name is taken as such, whatever characters of a glob the name has
    mode = _mode(corpus, path)
    listing = Listing()
    if stat.S_ISDIR(mode):
        root, kind = path, "folder"
        listing = list_files(corpus, path, WHOLE_FOLDER, own)
    elif mode:
        root, kind, listing.paths = path.parent, "file", [str(path)]
    elif glob.has_magic(corpus):
        root, parts = split_glob(path)
        kind, listing = "glob", list_files(corpus, root, parts, own)
    else:
        raise corpus_error(corpus, "does not exist; give a file, folder or glob, or 'stdlib'")
    if not listing.paths:
        what = "holds no file that is not hidden" if kind == "folder" else "matches no file"
        raise corpus_error(corpus, f"{what}; give another path")
    # names below the root: a corpus that was moved keeps its documents, and so its split
    files = [_source_file(corpus, Path(file), root) for file in listing.paths]
    files.sort(key=lambda file: file.name)
    kept = _each_once(files)
    told = _told(kept, len(files) - len(kept), listing.left_out)
    return Source(corpus, f"{len(kept)} file(s) of {kind} {corpus} ({told})", kept)


def _mode(corpus: str, path: Path) -> int:
    """Return the mode of the file, 0 where there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    except OSError as error:
        raise unreadable(corpus, str(path), error) from error


def _each_once(files: list[SourceFile]) -> list[SourceFile]:
    """Keep one of several paths to a file: the first one named as records, else the first."""
    first: dict[tuple[object, ...], SourceFile] = {}
    # a stable sort: records first, else in the order of names
    for file in sorted(files, key=lambda file: not file.is_jsonl):
        first.setdefault(file.identity, file)
    return [file for file in files if first[file.identity] is file]


def _told(files: list[SourceFile], repeated: int, left_out: list[str]) -> str:
    """Say what was found: "2 of records, 1 of plain text; left out: 1 folder(s) of runs or caches"."""
    records = sum(file.is_jsonl for file in files)
    counts = ((records, "of records"), (len(files) - records, "of plain text"))
    found = ", ".join(f"{count} {what}" for count, what in counts if count)
    missing = ((repeated, "more path(s) to the same files"), (len(left_out), "folder(s) of runs or caches"))
    left = ", ".join(f"{count} {what}" for count, what in missing if count)
    return f"{found}; left out: {left}" if left else found


def _source_file(corpus: str, path: Path, root: Path, document: str = "") -> SourceFile:
    if path.suffix in INDEXED_SUFFIXES:
        raise corpus_error(corpus, f"{path} is a .bin or .idx; give the prefix of one .bin/.idx pair instead")
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(corpus, str(path), error) from error
    if not stat.S_ISREG(status.st_mode):
        raise corpus_error(
            corpus,
            f"{path} is not a regular file but a pipe or a device; write its content to one, or leave it out",
        )
    name = path.relative_to(root).as_posix()
    # Surrogates stand for bytes of a file name that are not UTF-8; JSON and hashes want text.
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return SourceFile(
        path=str(path.absolute()),
        name=name,
        document=document or name,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        # with size and time: two files to which a file system gives the same number stay two
        identity=(file_number(path, status), status.st_size, status.st_mtime_ns),
    )


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root):
        # in place: os.walk then leaves the others out and goes by name
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
    """Name the document that a file of the standard library belongs to.

    A package is one document. Modules outside packages are put together by first letter, and so are those of
    the package `test`, whose sub-packages are documents of their own. Examples: asyncio/tasks.py -> asyncio,
    abc.py -> modules/a, test/test_bool.py -> test/modules/b, test/test_json/test_dump.py -> test/test_json.
    """
    package = path.parts[:-1]
    if not package or package == ("test",):
        # single modules are joined to documents of the size of packages
        letter = path.name.removeprefix("test_").lstrip("_")[:1].lower()
        return "/".join((*package, "modules", letter))
    return "/".join(package[: 2 if package[0] == "test" else 1])
