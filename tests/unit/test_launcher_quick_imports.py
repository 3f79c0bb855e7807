"""Imports without garbage collection."""

import gc
import importlib

import pytest

from launchers.cli.quick_imports import quick_imports


def test_collector_is_paused_also_when_an_import_fails() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_of_False"), quick_imports():
        importlib.import_module(f"nothing_of_{gc.isenabled()}")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
