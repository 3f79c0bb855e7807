"""Hold what the steps of a child process share: device, clock, tensors, and what was found so far."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.comparison import Check
from benchmarks.gpu.problem import M3, SMOKE, LayerSizes, Tensors
from benchmarks.gpu.records import Record, Records
from benchmarks.gpu.rows import INDEPENDENT, Dense, Rates, Row


@dataclass(frozen=True, slots=True)
class Scale:
    """Hold what differs between a GPU and a smoke test."""

    sizes: LayerSizes
    """Of the layer."""
    dtype: torch.dtype
    """Of inputs."""
    matmul_size: int
    """Rows and columns of the matrices by which the device's FLOP/s are measured."""
    copy_bytes: int
    """Size of the copy by which its bytes/s are."""
    check_seq_len: int
    """Keys of a check."""
    check_queries: int
    """Queries of a check."""
    topk_seq_len: int
    """Keys of the selection of few queries."""
    topk_queries: int
    """Queries of the selection of few queries."""
    most_values: int
    """Of the queries of all groups or heads that are timed together."""


GPU = Scale(M3, torch.bfloat16, 8192, 2**31, 8192, 512, 2**17, 1024, 2**31)
# the interpreter computes garbage in bf16; in fp16 errors come from rounding inputs, as there
TINY = Scale(SMOKE, torch.float16, 256, 2**20, 128, 16, 64, 16, 2**31)


class LeftOutError(Exception):
    """Report that a step is not made, for the reason in the text; another call of the command may make it."""


@dataclass(frozen=True, slots=True)
class Step:
    """Describe one measurement: what a crash costs at most."""

    call: Callable[[], None]
    """Measures and records."""
    needs: tuple[str, ...] = ()
    """Checks that must have passed: CASE, with all it compares, or CASE: OUTPUT."""
    after: tuple[str, ...] = ()
    """Steps of the same part that must have been made."""
    need_s: Callable[[], float] = field(default=lambda: 0.0)
    """About how long it takes, from what has been measured."""


class Part(Protocol):
    """Do a child's work; tensors that its steps share are made when the first of them asks."""

    def steps(self) -> Mapping[str, Step]:
        """Return the steps by name, in order."""
        ...


class Context:
    """Hold everything that a part needs, in one process."""

    def __init__(
        self, records: Records, device: str, kernel: str, seed: int, deadline: float, *, smoke: bool
    ) -> None:
        self.records, self.kernel = records, kernel
        self.device = torch.device(device)
        self.smoke, self.scale = smoke, TINY if smoke else GPU
        self.clock = Clock(self.device, deadline, quick=smoke)
        self.tensors = Tensors(self.device, self.scale.dtype, seed)

    @property
    def sizes(self) -> LayerSizes:
        """Return the sizes of the layer."""
        return self.scale.sizes

    @property
    def uses_graphs(self) -> bool:
        """Tell whether short calls are replayed as CUDA graphs; the paths in torch wait for the device."""
        return self.device.type == "cuda" and self.kernel == "triton"

    def short_seconds(self, name: str, call: Callable[[], object]) -> tuple[float, float | None]:
        """Time a short call: seconds of a CUDA graph's replays, and of calls from Python.

        The latter alone, and None, where there are no graphs or none of this call, which is noted.
        """
        eager_s = self.clock.seconds(call)
        if not self.uses_graphs:
            return eager_s, None
        try:
            return self.clock.graph_seconds(call), eager_s
        except Exception as error:
            if not self.device_works():
                raise
            self.note(f"{name}: no CUDA graph, timed from Python: {error}".splitlines()[0])
            return eager_s, None

    def device_works(self) -> bool:
        """Return whether the device takes calls of this process: after an illegal access it does not."""
        if self.device.type != "cuda":
            return True
        try:
            torch.ones(1, device=self.device).sum().item()
        except Exception:
            # every call fails with the error of the one that broke it
            return False
        return True

    @cached_property
    def rates(self) -> Rates:
        """Return the rates of the device, which each call of the command measures before everything else.

        Raises:
            LeftOutError: they are not there.
        """
        before = [found for found in self.found("rates") if found["when"] == "before"]
        if not before:
            raise LeftOutError("the device's rates were not measured")
        return Rates(before[-1]["matmul_flops"], before[-1]["copy_bytes"])

    def add(self, row: Row) -> None:
        """Record a row, beside dense attention where that has been timed."""
        for dense in self.found("dense"):
            if (dense["what"], dense["seq_len"]) == (row.what, row.seq_len):
                row.beside(Dense(**dense), self.rates)
        self.records.append("row", **asdict(row.finish(self.rates)))

    def add_dense(self, dense: Dense) -> None:
        """Record a time of dense attention, and every row that it is the rival of once more."""
        self.records.append("dense", **asdict(dense))
        latest = {row.key: row for row in (Row(**fields) for fields in self.found("row"))}
        for row in latest.values():
            if (row.what, row.seq_len) == (dense.what, dense.seq_len):
                self.add(row)

    def add_check(self, group: str, check: Check) -> None:
        """Record a comparison."""
        self.records.append("check", group=group, **asdict(check), passed=check.passed)

    def note(self, text: str) -> None:
        """Record a sentence for the end of the table."""
        self.records.append("note", text=text)

    def found(self, kind: str) -> list[Record]:
        """Return the fields of all records of a kind, oldest first."""
        records = [record for record in self.records.read() if record["kind"] == kind]
        return [{name: value for name, value in record.items() if name != "kind"} for record in records]

    def seconds_of(self, what: str, seq_len: int, selection: str = INDEPENDENT) -> float:
        """Return our time of a row.

        Raises:
            LeftOutError: it was not measured.
        """
        found: dict[str, Any] | None = None
        for fields in self.found("row"):
            if (fields["what"], fields["seq_len"], fields["selection"]) == (what, seq_len, selection):
                found = fields
        if found is None:
            raise LeftOutError(f"{what} at {seq_len} tokens was not measured")
        return float(found["ours_s"])

    def shorter(self, what: str, seq_len: int) -> tuple[int, float] | None:
        """Return length and our time of the longest measured sequence up to this one, to foretell a time."""
        fitting = [
            (fields["seq_len"], fields["ours_s"])
            for fields in self.found("row")
            if fields["what"] == what and fields["seq_len"] <= seq_len
        ]
        return max(fitting, default=None)
