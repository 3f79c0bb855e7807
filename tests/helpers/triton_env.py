"""Run Triton kernels where there is no GPU, and see what they compile to.

Triton decides when a kernel is decorated whether it is interpreted. So that this does not depend on what was
imported before, kernels run in worker processes with the environment they need; with a GPU they run on it, in
the process of the test.
"""

import atexit
import multiprocessing
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.compiled_kernel import CompiledKernel, compile_for_hopper

HAS_GPU = torch.cuda.is_available()
# The interpreter computes garbage in bf16 (without an error), so that it is checked on devices only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
# Shared memory that one program may use on sm_90. Triton refuses more at launch only.
MAX_SHARED_BYTES = 232448


def _why_not() -> str:
    try:
        triton_version = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if not HAS_GPU and _release(triton_version) < (3, 7) and _release(version("numpy")) >= (2, 4):
        return f"the interpreter of triton {triton_version} cannot loop with numpy {version('numpy')}"
    return ""


def _release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


needs_triton = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "triton is there")


def run_triton(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call fn where kernels run: on the GPU if there is one, otherwise in a worker with the interpreter.

    Args:
        fn: at module level; imports kernels when it is called, not when its module is imported.
        args, kwargs: picklable; tensors on the CPU, alone or in tuples, lists and dicts.

    Returns:
        What fn returned, with all tensors on the CPU. Exceptions of fn arrive as they are.
    """
    if HAS_GPU:
        args, kwargs = _to_device((args, kwargs), "cuda")
        return _to_device(fn(*args, **kwargs), "cpu")
    return _call_in("interpret", fn, args, kwargs)


def compiled_kernels(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[CompiledKernel]:
    """Compile for sm_90 every kernel that fn launches, with the arguments and options it launches it with.

    Kernels do not run: fn finds their outputs as it allocated them, so its control flow must not depend on
    them. fn and the arguments as in `run_triton`; tensors stay on the CPU, bf16 allowed. No GPU is used.
    """
    return _call_in("compile", _record_compiled, (fn, args, kwargs), {})


def assert_fits_hopper(kernels: list[CompiledKernel]) -> None:
    """Fail unless every kernel keeps its values in registers and its tiles in shared memory."""
    assert kernels, "no kernel was launched"
    for kernel in kernels:
        where = f"{kernel.name} {kernel.constants} warps={kernel.num_warps} stages={kernel.num_stages}"
        assert kernel.stack_bytes == 0, f"{where}: spills {kernel.stack_bytes} bytes per thread"
        assert kernel.shared_bytes <= MAX_SHARED_BYTES, f"{where}: {kernel.shared_bytes} bytes shared"


def _to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


_pools: dict[str, ProcessPoolExecutor] = {}


def _call_in(mode: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call fn in the one worker process of this mode; plain bytes travel, no shared memory."""
    call = pickle.dumps((fn, args, kwargs))
    if mode in _pools:
        return pickle.loads(_pools[mode].submit(_work, call).result())
    settings = {"interpret": {"TRITON_INTERPRET": "1"}, "compile": {"TRITON_INTERPRET": "0"}}[mode]
    settings["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton_cache_")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        # spawn: the worker inherits nothing but the environment, and has imported no triton yet
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        future = pool.submit(_work, call)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    _pools[mode] = pool
    atexit.register(subprocess.run, ["rm", "-rf", settings["TRITON_CACHE_DIR"]], check=False)
    return pickle.loads(future.result())


def _work(call: bytes) -> bytes:
    torch.set_num_threads(1)
    fn, args, kwargs = pickle.loads(call)
    return pickle.dumps(fn(*args, **kwargs))


def _record_compiled(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[CompiledKernel]:
    return compile_for_hopper(lambda: fn(*args, **kwargs))
