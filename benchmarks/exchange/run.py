"""Measure one MSA layer's exchange over links of limited rate, in every scheme; write a table and JSON.

    python -m benchmarks.exchange.run                # all of it; needs root or user namespaces: README.md
    python -m benchmarks.exchange.run --unshaped     # the same over loopback, as fast as this machine is
    python -m benchmarks.exchange.run --parts 8 --rates 200 --selections 0.2 --rounds 1

Changes nothing outside its own processes and namespaces.
"""

# ruff: noqa: E402
import os

# Before torch is imported: one thread per rank and none that a fork would lose, no notes about host names.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.exchange import namespaces
from benchmarks.exchange.cluster import RankError
from benchmarks.exchange.formulas import LayerShape
from benchmarks.exchange.measure import Measurement, make_part
from benchmarks.exchange.report import markdown
from benchmarks.exchange.schemes import DEFAULT_SCHEMES, SCHEMES
from benchmarks.exchange.selections import TRAINED
from benchmarks.machine import ROOT, command, machine

SELECTIONS = ("0.05", "0.2", "0.5", "1.0", TRAINED)


def _say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: naming the argument and the rule.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["4", "8", "2x4"], help="numbers of ranks; 2xN: two nodes of N ranks"
    )
    parser.add_argument(
        "--rates", nargs="+", type=int, default=[200, 1000], help="Mbit/s of each rank's link"
    )
    parser.add_argument(
        "--node-rates",
        nargs=2,
        type=int,
        default=[1000, 400],
        metavar=("RANK", "NODES"),
        help="Mbit/s of 2xN: each rank's link, and the one between the nodes",
    )
    parser.add_argument(
        "--selections", nargs="+", default=list(SELECTIONS), help="values of f, and `trained`"
    )
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(DEFAULT_SCHEMES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each scheme")
    parser.add_argument(
        "--seq-len", type=int, default=LayerShape().seq_len, help="tokens of constructed packs"
    )
    parser.add_argument("--no-kl", action="store_true", help="leave the index branch's loss out")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--unshaped", action="store_true", help="over loopback; needs no privileges")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="longest wait for any step")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds}: must be at least 1")
    for name in arguments.selections:
        if name != TRAINED and not _is_share(name):
            raise ValueError(f"--selections {name}: must be `{TRAINED}` or a share from 0 to 1")
    return arguments


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Measure and write.

    Returns:
        Exit code: 0, 1 where a rank failed or hung, 2 where it is not possible here, 130 if interrupted.
    """
    try:
        arguments = parse(argv)
        if not arguments.unshaped:
            namespaces.enter_own_network()
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"exchange benchmark: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RankError, TimeoutError) as error:
        print(f"exchange benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    # A request to end goes the same way as an interrupt: ranks are killed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    start = time.monotonic()
    measurement = Measurement(arguments, _say)
    parts = [make_part(name, arguments.rates, arguments.node_rates) for name in arguments.parts]
    if not measurement.shaped:
        parts = [replace(part, rates=()) for part in parts]
    for part in parts:
        measurement.run(part)
    if arguments.memory:
        measurement.measure_memory(max(parts, key=lambda part: (part.nodes == 1, part.ranks)), "0.2")
    result = {
        "command": command("benchmarks.exchange.run", argv),
        "seconds": time.monotonic() - start,
        "machine": machine(),
        "shape": asdict(measurement.shape),
        "shaped": measurement.shaped,
        "rounds": arguments.rounds,
        "selections": measurement.pairs,
        "rates": measurement.rates,
        "rows": measurement.rows,
        "memory": measurement.memory,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "exchange.json").write_text(_json(result))
    text = markdown(result)
    (arguments.out / "exchange.md").write_text(text)
    _say(text)
    return 0


def _json(result: dict[str, Any]) -> str:
    """Write a line per row, so that files stay small and differences readable."""
    lists = {name: value for name, value in result.items() if isinstance(value, list)}
    head = json.dumps({name: value for name, value in result.items() if name not in lists}, indent=1)
    parts = [
        f' "{name}": [\n' + ",\n".join(json.dumps(_short(row)) for row in rows) + "\n ]"
        for name, rows in lists.items()
    ]
    return head.removesuffix("\n}") + ",\n" + ",\n".join(parts) + "\n}\n"


def _short(value: Any) -> Any:
    """Round floats to 6 digits: 0.123456789 -> 0.123457."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < 1e6 else round(value)
    if isinstance(value, dict):
        return {key: _short(x) for key, x in value.items()}
    return [_short(x) for x in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
