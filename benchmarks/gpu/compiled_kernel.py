"""Compile kernels for sm_90 where no GPU is, and read what they take: registers, memory, instructions."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Of one multiprocessor of compute capability 9.0 (CUDA programming guide, technical specifications)
_REGISTERS = 65536
_SHARED_BYTES = 233472
_THREADS = 2048
_PROGRAMS = 32
# of each program, for the system
_SHARED_RESERVED = 1024
# registers are given to a warp in units of this many
_REGISTER_UNIT = 256


@dataclass(frozen=True)
class CompiledKernel:
    """Describe one compiled kernel: resources per thread and per program."""

    name: str
    """Of the function."""
    constants: dict[str, Any]
    """Values of the constexpr parameters, by name."""
    num_warps: int
    """Warps of 32 threads of a program."""
    num_stages: int
    """Of the options; loops have their own."""
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread, what did not fit into registers: 0 means no spills."""
    shared_bytes: int
    """Of a program."""
    ptx: str
    """The assembly, to look for wgmma or cp.async."""
    sass: str
    """The machine's instructions."""

    @property
    def programs(self) -> int:
        """Return how many programs a multiprocessor runs at a time."""
        per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        return min(
            _REGISTERS // (per_warp * self.num_warps),
            _SHARED_BYTES // (self.shared_bytes + _SHARED_RESERVED),
            _THREADS // (32 * self.num_warps),
            _PROGRAMS,
        )

    @cached_property
    def main_loop(self) -> tuple[int, int]:
        """Count the instructions of one step of the main loop, and its products among them.

        The main loop has the most products, and is the shortest of those; without products the longest loop.
        """
        # of 16 bits, of 8 bits
        loops = [(body.count("HGMMA") + body.count("QGMMA"), len(body)) for body in _loops(self.sass)]
        if not loops:
            return 0, 0
        products = max(found for found, _ in loops)
        lengths = [length for found, length in loops if found == products]
        return (min(lengths) if products else max(lengths)), products


def _loops(sass: str) -> list[list[str]]:
    """List the loops: names of the instructions from a backward branch's target to the branch."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", sass)
    addresses = [int(address, 16) for address, _, _ in found]
    names = [name for _, name, _ in found]
    loops = []
    for place, (_, name, operands) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        # the last instruction of a kernel jumps to itself
        if target is not None and int(target[1], 16) < addresses[place]:
            loops.append(names[addresses.index(int(target[1], 16)) : place + 1])
    return loops


@contextlib.contextmanager
def compile_only(found: Callable[[Any, Any], None] = lambda *_: None) -> Iterator[None]:
    """Compile every Triton kernel that is launched, with the arguments it is launched with, and skip it.

    found: is told the kernel and what became of it.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def without_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        found(self, compiled)
        return compiled

    JITFunction.run = without_launch
    try:
        yield
    finally:
        JITFunction.run = run


def compile_for_hopper(launch: Callable[[], object]) -> list[CompiledKernel]:
    """Compile every kernel that `launch` launches, with its arguments and options; nothing runs.

    Tensors lie on the CPU, and outputs are as `launch` allocated them. Once per process: Triton is told for
    good that the device is an H100.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    class HopperWithoutDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    triton.runtime.driver.set_active(HopperWithoutDevice())
    recorded: dict[str, CompiledKernel] = {}

    def record(kernel: Any, compiled: Any) -> None:
        if compiled.hash not in recorded:
            recorded[compiled.hash] = _describe(kernel, compiled)

    with compile_only(record):
        launch()
    return list(recorded.values())


def _describe(kernel: Any, compiled: Any) -> CompiledKernel:
    metadata = compiled.metadata
    usage, sass = (_dump(compiled.asm["cubin"], option) for option in ("--dump-resource-usage", "-sass"))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return CompiledKernel(
        name=metadata.name,
        constants={kernel.arg_names[path[0]]: value for path, value in compiled.src.constants.items()},
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=used["REG"],
        stack_bytes=used["STACK"],
        shared_bytes=metadata.shared,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def _dump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
