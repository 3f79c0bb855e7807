"""Make the steps of one part in a process, and write down what it begins and ends; see `supervise.py`.

Started as a module; its job, a JSON object (`Job`), is the first line of its standard input.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from msa_kernels.dispatch import has_triton

from benchmarks.gpu.check import check_cases
from benchmarks.gpu.comparison import Check
from benchmarks.gpu.compile_kernels import CompilePart
from benchmarks.gpu.context import Context, LeftOutError, Part, Step
from benchmarks.gpu.decode import DecodePart
from benchmarks.gpu.dense import DensePart
from benchmarks.gpu.device_rates import RatesPart
from benchmarks.gpu.flash_msa_part import FlashMsaPart
from benchmarks.gpu.ours import OursPart
from benchmarks.gpu.plan import COMPILE_SHARES, PartSpec
from benchmarks.gpu.records import DONE, FAILED, LEFT_OUT, Records
from benchmarks.gpu.topk import TopkPart
from benchmarks.gpu.variants import VariantsPart

if has_triton():
    # takes a second: before there is a job
    import triton  # noqa: F401

# Exit code of a child whose device takes no more calls: the next child goes on.
BROKEN_DEVICE = 70
# A fault on purpose, PART/STEP: the process aborts there, as after an illegal access.
ABORT_VARIABLE = "MSA_BENCHMARK_ABORT"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Job:
    """Hold what a child is told."""

    folder: str
    """That of all results."""
    part: PartSpec
    """Whose steps it makes."""
    log: str
    """File for what the process prints."""
    skip: list[str]
    """Steps that are over."""
    seq_lens: list[int]
    """Tokens of all lengths of the run, for which kernels are compiled."""
    device: str
    """As torch names it."""
    kernel: str
    """As the operators name it, e.g. triton."""
    seed: int
    """Of all tensors."""
    smoke: bool
    """Small sizes, to try the benchmark itself."""
    deadline: float
    """End of the run's time, in seconds of the monotonic clock."""

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read what `supervise.py` has written."""
        fields = json.loads(text)
        return cls(**fields | {"part": PartSpec(**fields["part"])})


class ChecksPart:
    """Make all cases of one group of checks, each a step."""

    def __init__(self, context: Context, group: str) -> None:
        self.context, self.group = context, group

    def steps(self) -> dict[str, Step]:
        """Return a step for each case."""
        context, scale = self.context, self.context.scale
        cases = check_cases(
            self.group, context.tensors, context.sizes, context.kernel,
            seq_len=scale.check_seq_len, num_queries=scale.check_queries,
        )  # fmt: skip
        return {name: Step(lambda case=case: self._make(case)) for name, case in cases.items()}

    def _make(self, case: Callable[[], list[Check]]) -> None:
        for check in case():
            self.context.add_check(self.group, check)


def make_part(context: Context, job: Job) -> Part:
    """Return the part that the job names."""
    spec = job.part
    makers: dict[str, Callable[[], Part]] = {
        "compile": lambda: CompilePart(context, int(spec.detail), COMPILE_SHARES, job.seq_lens),
        "checks": lambda: ChecksPart(context, spec.detail),
        "rates": lambda: RatesPart(context, spec.detail),
        "ours": lambda: OursPart(context, spec.seq_len, spec.detail),
        "dense": lambda: DensePart(context, spec.seq_len),
        "decode": lambda: DecodePart(context, spec.seq_len),
        "topk": lambda: TopkPart(context),
        "flash_msa": lambda: FlashMsaPart(context, spec.seq_len),
        "variants": lambda: VariantsPart(context, spec.seq_len),
    }
    return makers[spec.kind]()


class Worker:
    """Make the steps of one part."""

    def __init__(self, context: Context, job: Job) -> None:
        self.context, self.job, self.records = context, job, context.records

    def run(self) -> int:
        """Make all steps that are not over; returns the exit code."""
        steps = make_part(self.context, self.job).steps()
        for name, step in steps.items():
            if name in self.job.skip:
                continue
            self.records.append("begin", part=self.job.part.name, step=name)
            status, why = self._make(name, step)
            self.records.append("end", part=self.job.part.name, step=name, status=status, why=why)
            if status == FAILED and not self.context.device_works():
                return BROKEN_DEVICE
        self.records.append("part", part=self.job.part.name)
        return 0

    def _make(self, name: str, step: Step) -> tuple[str, str]:
        if os.environ.get(ABORT_VARIABLE) == f"{self.job.part.name}/{name}":
            os.abort()
        try:
            self._ask(step)
            self.context.clock.forget_memory()
            step.call()
        except LeftOutError as error:
            return LEFT_OUT, str(error)
        except Exception as error:
            # out of memory, or whatever a compiler or driver says: the rest goes on
            return FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        return DONE, ""

    def _ask(self, step: Step) -> None:
        """Raise LeftOutError where the step must not, or cannot be made."""
        left_s, need_s = self.context.clock.left_s, step.need_s()
        if left_s <= 0 or need_s > left_s:
            raise LeftOutError(f"{max(0.0, left_s):.0f} s are left and it would take about {need_s:.0f}")
        ends = self.context.found("end")
        status = {(end["part"], end["step"]): end["status"] for end in ends}
        for name in step.after:
            if status.get((self.job.part.name, name)) != DONE:
                raise LeftOutError(f"{name} was not measured")
        for check in step.needs:
            if why := self._not_right(check, status):
                raise LeftOutError(why)

    def _not_right(self, name: str, status: dict[tuple[str, str], str]) -> str:
        """Return why a check (CASE or CASE: OUTPUT) is not known to have passed; empty where it is."""
        case = name.partition(":")[0]
        said = [how for (part, step), how in status.items() if part.startswith("checks-") and step == case]
        if said != [DONE]:
            return f"check {case}: {said[0] if said else 'not made'}"
        # of every check the last result
        checks = {check["name"]: check["passed"] for check in self.context.found("check")}
        of_case = {one: passed for one, passed in checks.items() if one == name or one.startswith(f"{name}:")}
        wrong = [one for one, passed in of_case.items() if not passed]
        if wrong or not of_case:
            return f"check failed: {', '.join(wrong) or name}"
        return ""


def die_with_parent() -> None:
    """Ask the kernel to end this process with the one that started it: a device must not stay occupied."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def print_to(path: str) -> None:
    """Let this process, libraries and children included, print to the end of a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.close(log)


def main() -> int:
    """Run the job; returns the exit code."""
    die_with_parent()
    line = sys.stdin.readline()
    if not line:
        # started ahead, and not needed
        return 0
    job = Job.from_json(line)
    print_to(job.log)
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    context = Context(
        Records(Path(job.folder)), job.device, job.kernel, job.seed, job.deadline, smoke=job.smoke
    )
    return Worker(context, job).run()


if __name__ == "__main__":
    sys.exit(main())
