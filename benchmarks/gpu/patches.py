"""Set module constants to other values for a while: limits and tile sizes that launches look up."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

# module, name in it, value
Change = tuple[str, str, Any]


@contextlib.contextmanager
def changed(changes: Sequence[Change]) -> Iterator[None]:
    """Set the values, and the old ones again at the end."""
    modules = [importlib.import_module(module) for module, _, _ in changes]
    before = [getattr(module, name) for module, (_, name, _) in zip(modules, changes, strict=True)]
    try:
        for module, (_, name, value) in zip(modules, changes, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for module, (_, name, _), value in zip(modules, changes, before, strict=True):
            setattr(module, name, value)
