"""Read the pickles inside of checkpoints by a list of allowed names, so that no code of a stranger is run.

`.metadata` is a pickle, and so is each stored object, inside of torch's zip archive. A pickle can name any
function of Python and have it called. Here every name is looked up in a list of what true checkpoints have;
the first pass makes stand-ins, and nothing is imported before all names are known. Standard library only, for
checks that must not wait for torch.
"""

import gc
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from msa_train.runtime.untrusted_files import open_regular

METADATA_NAME, COMMON_NAME = ".metadata", "common.pt"

_DCP = "torch.distributed.checkpoint.metadata"
_METADATA_NAMES = {
    *((_DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP, name) for name in ("BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata")),
    (_DCP, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
# where the checkpoint was written, of no use to a reader; the second since Python 3.13
_PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
_OBJECT_NAMES = {
    *(("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    *(("torch", name) for name in ("Size", "device")),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *(("__builtin__", name) for name in ("set", "bytearray", "complex")),
    *(("builtins", name) for name in ("set", "bytearray", "complex")),
}
_DTYPE = re.compile(r"(b?float|complex|q?u?int|bits)\d+\w*|bool")
_STORAGE = re.compile(r"[A-Z][A-Za-z0-9]*Storage")


class _Frozen(type):
    """Keep a pickle from giving attributes to the class of a stand-in itself."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name} of {cls.__name__}")


class _StandIn(metaclass=_Frozen):
    """Take whatever the true class takes, and call nothing."""

    def __new__(cls, *_args: object, **_named: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Scanner(pickle.Unpickler):
    """Make stand-ins for what `.metadata` may name, and refuse the rest."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        self.check(module_name, global_name)
        return _Frozen(global_name, (_StandIn,), {})

    def check(self, module: str, name: str) -> None:
        """Refuse what a true pickle of this kind never names."""
        known = _METADATA_NAMES | _PATHS
        if (module, name) not in known and not (module == "torch" and _DTYPE.fullmatch(name)):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no true one does")


class _ObjectScanner(_Scanner):
    """Do the same for stored objects: plain values and tensors."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # the pickle sets its items, so it must be a true one
        made = super().find_class(module_name, global_name)
        return OrderedDict if global_name == "OrderedDict" else made

    def check(self, module: str, name: str) -> None:
        in_torch = module == "torch" and (_DTYPE.fullmatch(name) or _STORAGE.fullmatch(name))
        if (module, name) not in _OBJECT_NAMES and not in_torch:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no plain value does")

    def persistent_load(self, pid: Any, /) -> Any:
        # a tensor's numbers, which lie beside the pickle and are no code
        return None


class _Loader(pickle.Unpickler):
    """Make the true objects, of a pickle that has been scanned."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _PATHS:
            return _joined
        return super().find_class(module_name, global_name)


def _joined(*parts: str) -> str:
    """Stand in for a path's class: a text, whatever the system that wrote it."""
    return "/".join(parts)


def read_metadata(folder: Path) -> Any:
    """Read a checkpoint's `.metadata` and run nothing that is in it.

    Returns:
        torch.distributed.checkpoint.metadata.Metadata.

    Raises:
        ValueError: one line, if it is no true one.
        OSError: if it cannot be read.
    """
    data = _content(folder / METADATA_NAME)
    _scanned(data, folder)
    try:
        return _unpickled(_Loader(io.BytesIO(data)))
    except Exception as error:
        raise _not_true(folder, METADATA_NAME, error) from error


def metadata_places(folder: Path) -> set[str]:
    """Name the files that `.metadata` describes, which are in the folder if anywhere; reads none of them.

    Raises:
        ValueError: one line without the folder, if it is no true one.
        OSError: if it cannot be read.
    """
    try:
        places = _scanned(_content(folder / METADATA_NAME), folder).state["storage_data"].values()
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{folder}/")) from error
    return {place.state["relative_path"] for place in places}


def objects_damage(folder: Path) -> str | None:
    """Check the stored objects and the common data: they must be plain values and tensors.

    Reads a few KB per object: one of each rank that saved, 256 of 256 ranks, and one of each module.

    Returns:
        One line of what is wrong, None if nothing is.
    """
    try:
        for name, data in _stored_objects(folder):
            check_object(data, name)
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    return None


def check_object(data: bytes, name: str) -> None:
    """Refuse a stored object, or common data, that is more than plain values and tensors.

    Args:
        data: what torch.save wrote.
        name: for the message.

    Raises:
        ValueError: one line.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (entry,) = (one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            # some KB that unpack to any size; torch.save never compresses
            if entry.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("is compressed")
            content = archive.read(entry)
        _ObjectScanner(io.BytesIO(content)).load()
    except Exception as error:
        raise ValueError(f"object {name}: is no plain value ({_reason(error)})") from error


def _scanned(data: bytes, folder: Path) -> Any:
    """Scan `.metadata`: return the stand-in of Metadata, with every place inside of the folder."""
    try:
        metadata = _unpickled(_Scanner(io.BytesIO(data)))
        for place in metadata.state["storage_data"].values():
            path, begin, length = (place.state[name] for name in ("relative_path", "offset", "length"))
            # readers open what stands here, so no place may lead elsewhere
            if Path(path).name != path or path in ("", ".."):
                raise pickle.UnpicklingError(f"leads to {path}, outside of the checkpoint")
            if not (type(begin) is type(length) is int and begin >= 0 and length >= 0):
                raise pickle.UnpicklingError("has places that are no numbers")
    except Exception as error:
        raise _not_true(folder, METADATA_NAME, error) from error
    return metadata


def _unpickled(unpickler: pickle.Unpickler) -> Any:
    """Load a pickle: 16 MB, of 100,000 boxes as some hundred ranks write them, in 1 s."""
    with without_collection():
        return unpickler.load()


@contextmanager
def without_collection() -> Iterator[None]:
    """Make many objects without garbage collection, which would go through all of them again and again.

    Those of 16 MB of `.metadata` take 3 s with it and 1 s without.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stored_objects(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every stored object, and of the common data."""
    if (folder / METADATA_NAME).exists():
        metadata = _scanned(_content(folder / METADATA_NAME), folder).state
        entries, places = metadata["state_dict_metadata"], metadata["storage_data"]
        for index, place in places.items():
            # by the name of its type: these are stand-ins
            key = index.state["fqn"]
            if type(entries.get(key)).__name__ != "BytesStorageMetadata":
                continue
            with open_regular(folder / place.state["relative_path"]) as file:
                yield key, _slice(file, place.state["offset"], place.state["length"], key)
    if (folder / COMMON_NAME).exists():
        yield COMMON_NAME, _content(folder / COMMON_NAME)


def _content(path: Path) -> bytes:
    """Read a regular file whole."""
    with open_regular(path) as file:
        return file.read()


def _slice(file: IO[bytes], offset: int, length: int, key: str) -> bytes:
    """Read part of a file, whose length is checked first: `length` is a stranger's number."""
    if offset + length > file.seek(0, io.SEEK_END):
        raise ValueError(f"object {key}: its file ends too early")
    file.seek(offset)
    return file.read(length)


def _not_true(folder: Path, name: str, error: Exception) -> ValueError:
    """Make the error of a file that is not of a checkpoint."""
    return ValueError(f"{folder}/file {name}: is not of a checkpoint ({_reason(error)})")


def _reason(error: Exception) -> str:
    """Name a cause in a word or a line; other errors' texts are of torch and may quote the file."""
    lines = str(error).splitlines()
    return lines[0] if isinstance(error, pickle.UnpicklingError) and lines else type(error).__name__
