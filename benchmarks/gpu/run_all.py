"""Check the kernels on this GPU, then time them against dense attention: one command, eight minutes.

    python benchmarks/gpu/run_all.py --out DIR                        # a Hopper GPU; needs torch and triton
    python benchmarks/gpu/run_all.py --out DIR --device cpu --smoke   # tiny, in Triton's interpreter

Every result is written to DIR/records.jsonl at once; DIR/gpu.json and DIR/gpu.md are made from it meanwhile.
The same command with the same DIR makes what is missing. Exit code 0: all of it, and right; 1: a kernel is
wrong; 2: bad arguments; 3: something is missing, the table says what.
"""

# ruff: noqa: E402
import argparse
import hashlib
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
# modules beside a script may have the names of other packages' modules
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from msa_kernels.dispatch import has_triton

from benchmarks.gpu.context import GPU, TINY
from benchmarks.gpu.plan import SEQ_LENS, PartSpec, choose, make_plan
from benchmarks.gpu.records import DONE, FAILED, Record, Records
from benchmarks.gpu.report import load, markdown, row_text, write
from benchmarks.gpu.rows import Row
from benchmarks.gpu.supervise import Supervisor, child_environment
from benchmarks.machine import machine

BUDGET_S = 480.0
# Compilations and checks side by side
MOST_AT_ONCE = 12
OK, WRONG, BAD_ARGUMENTS, MISSING = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what all calls with one output folder must have in common."""

    device: str
    kernel: str
    smoke: bool
    seed: int
    code: str
    """Hash of the code that is measured and of the benchmark."""
    gpu: str


class StoppedError(Exception):
    """Report that the command was asked to end."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: an argument is bad, with the text for the user.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--parts", nargs="+", default=[], help="some of it: checks, 128K, decode, ...; default: all"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--kernel", choices=["triton", "cpu"], default="triton", help="what is measured")
    parser.add_argument("--seq-lens", nargs="+", type=int, help="tokens; default: 32K, 128K, 512K, 1M")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds after which it ends")
    parser.add_argument("--seed", type=int, help="of all inputs; default: another one every time")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: no GPU can be used here; use --device cpu --smoke")
    if arguments.device == "cpu" and not arguments.smoke:
        raise ValueError("--device=cpu: the sizes are a GPU's; add --smoke")
    if arguments.kernel == "triton" and not has_triton():
        raise ValueError("--kernel=triton: triton is not installed; pip install 'triton>=3.6,<3.10'")
    if not arguments.budget_s > 0:
        raise ValueError(f"--budget-s={arguments.budget_s}: must be above 0")
    block_size = (TINY if arguments.smoke else GPU).sizes.block_size
    arguments.seq_lens = arguments.seq_lens or ([4 * block_size] if arguments.smoke else list(SEQ_LENS))
    for seq_len in arguments.seq_lens:
        if seq_len < block_size or seq_len % block_size:
            raise ValueError(f"--seq-lens={seq_len}: must be a multiple of {block_size}, the block size")
    triton = arguments.kernel == "triton"
    compiled = triton and arguments.device == "cuda"
    arguments.plan = make_plan(
        arguments.seq_lens,
        compiled=compiled,
        variants=triton,
        flash_msa=compiled and not arguments.smoke and find_spec("flash_msa") is not None,
    )
    if arguments.parts:
        arguments.plan = choose(arguments.plan, arguments.parts)
    return arguments


def code_hash() -> str:
    """Return a hash of all code that results depend on: results of two states are never mixed."""
    total = hashlib.sha256()
    for folder in ("kernels/msa_kernels", "msa_train/parallel", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what runs where."""
    found = machine() | {"torch": str(torch.__version__), "code": code_hash()}
    found["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    if has_triton():
        import triton

        found["triton"] = triton.__version__
    if arguments.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found | {"platform": platform.platform()}


def begin(arguments: argparse.Namespace, records: Records, words: Sequence[str]) -> Settings:
    """Record this call and return its settings, the seed being that of the first call.

    Raises:
        ValueError: the folder holds results of other code, another device or other settings.
    """
    found = facts(arguments)
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**31
    settings = Settings(
        arguments.device, arguments.kernel, arguments.smoke, seed, found["code"], found.get("gpu", "")
    )
    for record in records.read():
        if record["kind"] != "run":
            continue
        if arguments.seed is None:
            settings = Settings(**asdict(settings) | {"seed": record["settings"]["seed"]})
        for name, value in asdict(settings).items():
            if record["settings"][name] != value:
                found_text = f"holds results with {name}={record['settings'][name]}, this call has {value}"
                raise ValueError(f"--out={arguments.out}: {found_text}; name another folder")
        break
    command = f"python benchmarks/gpu/run_all.py {' '.join(words)}"
    found |= {"seed": settings.seed, "smoke": settings.smoke}
    records.append("run", command=command, facts=found, settings=asdict(settings))
    return settings


def measure(arguments: argparse.Namespace, settings: Settings, records: Records) -> bool:
    """Make what is missing; returns whether all of the plan is there."""
    # deadlines of the monotonic clock hold in all processes
    deadline = time.monotonic() + arguments.budget_s

    def job_of(part: PartSpec, skip: list[str]) -> dict[str, Any]:
        job = {"folder": str(arguments.out), "part": part.as_json(), "skip": skip}
        job |= {name: getattr(settings, name) for name in ("device", "kernel", "seed", "smoke")}
        return job | {"seq_lens": arguments.seq_lens, "deadline": deadline - part.reserve_s}

    def on_record(record: Record) -> None:
        if text := text_of(record):
            print(text, flush=True)
        if record["kind"] in ("rates", "check", "row", "dense", "note", "end"):
            write(load(records.read()), arguments.out)

    logs = arguments.out / "logs"
    logs.mkdir(exist_ok=True)
    supervisor = Supervisor(
        records, logs, [sys.executable, "-m", "benchmarks.gpu.child"], job_of,
        child_environment(settings.device, settings.kernel), on_record, deadline,
        most_at_once=min(MOST_AT_ONCE, os.cpu_count() or 1),
    )  # fmt: skip
    over, done = made_before(records.read())
    missing = [part for part in arguments.plan if part.name not in over]
    if any(part.is_timed for part in missing):
        # beside new times belong the rates of this call
        missing = [part for part in arguments.plan if part.name not in over or part.kind == "rates"]
        done = {name: steps for name, steps in done.items() if not name.startswith("rates-")}
    return supervisor.run(missing, done)


def made_before(records: Sequence[Record]) -> tuple[set[str], dict[str, list[str]]]:
    """Return parts that earlier calls have made whole, and steps of the others that they have made."""
    status = {(r["part"], r["step"]): r["status"] for r in records if r["kind"] == "end"}
    over = {record["part"] for record in records if record["kind"] == "part"}
    done: dict[str, list[str]] = {}
    for (part, step), said in status.items():
        if said == DONE:
            done.setdefault(part, []).append(step)
        else:
            over.discard(part)
    return over, done


def text_of(record: Record) -> str:
    """Return what is said of a record at once; empty for most."""
    if record["kind"] == "row":
        return row_text(Row(**{name: value for name, value in record.items() if name != "kind"}))
    if record["kind"] == "check" and not record["passed"]:
        return f"CHECK FAILED: {record['name']}: {record['error']} of {record['allowed']} {record['text']}"
    if record["kind"] == "end" and record["status"] != DONE:
        said = "CHECK " if record["part"].startswith("checks-") and record["status"] == FAILED else ""
        return f"{said}{record['part']}, {record['step']}: {record['status']}: {record['why']}"
    return record["text"] if record["kind"] == "note" else ""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(argv)
        arguments.out = arguments.out.absolute()
        arguments.out.mkdir(parents=True, exist_ok=True)
        records = Records(arguments.out)
        settings = begin(arguments, records, words)
    except (ValueError, OSError) as error:
        print(f"run_all.py: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    complete = False
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        complete = measure(arguments, settings, records)
    except StoppedError as stopped:
        records.append("note", text=str(stopped))
    finally:
        result = load(records.read())
        write(result, arguments.out)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(markdown(result))
    if result.checks and not result.correct:
        return WRONG
    return OK if complete and not result.missing else MISSING


def _stop(number: int, _frame: object) -> NoReturn:
    raise StoppedError(f"ended by {signal.Signals(number).name}, {time.strftime('%H:%M:%S', time.gmtime())}")


if __name__ == "__main__":
    sys.exit(main())
