"""Measure what hiding the exchange under the scoring of blocks is worth, over links of limited rate.

    python -m benchmarks.exchange.scoring            # needs root or user namespaces: README.md
    python -m benchmarks.exchange.scoring --scoring 4.7 --parts 2x4 --rounds 5

The scoring takes `--scoring` times as long as all keys and values take over the slowest link: 4.7 is M3 at 1M
tokens on 64 H100s with 400 Gbit/s each, 1.2 with 100 Gbit/s, both by `msa-simulate`. Its stand-in sleeps. The
rival is the all-gather that starts before the scoring.
"""

# ruff: noqa: E402
import os

# Before torch is imported: one thread per rank and none that a fork would lose.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.exchange import namespaces
from benchmarks.exchange.cluster import RankError
from benchmarks.exchange.measure import Measurement, Part, make_part
from benchmarks.exchange.namespaces import Rates
from benchmarks.exchange.rank import StepReport
from benchmarks.exchange.schemes import SCORING_SCHEMES
from benchmarks.machine import ROOT, command, machine
from msa_train.simulate.reports.text import table

RIVAL = "all_gather_early"
MBIT = 1e6 / 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["8", "2x4"], help="see benchmarks.exchange.run")
    parser.add_argument("--rates", nargs="+", type=int, default=[200], help="Mbit/s of each rank's link")
    parser.add_argument(
        "--node-rates", nargs=2, type=int, default=[1000, 400], metavar=("RANK", "NODES"), help="of 2xN"
    )
    parser.add_argument("--selections", nargs="+", default=["0.05", "0.2", "0.5"], help="values of f")
    parser.add_argument(
        "--scoring", nargs="+", type=float, default=[1.2, 4.7], help="over the time of an all-gather"
    )
    parser.add_argument("--schemes", nargs="+", choices=SCORING_SCHEMES, default=list(SCORING_SCHEMES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each scheme")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="longest wait for any step")
    parser.add_argument("--unshaped", action="store_true", help="over loopback; needs no privileges")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    # what `Measurement` reads beside
    arguments.seq_len, arguments.no_kl = 4096, False
    return arguments


class ScoringMeasurement(Measurement):
    """Measure with scoring that takes its time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments, lambda text: print(text, flush=True))
        self.schemes = [RIVAL, *arguments.schemes]
        self.scoring: list[float] = arguments.scoring

    def run(self, part: Part) -> None:
        """Measure every selection, rate, length of scoring and scheme of a part."""
        schemes = self._schemes(part)
        with self._cluster(part) as cluster:
            cluster.call("connect", schemes)
            cases = [self._prepare(cluster, part, selection, schemes) for selection in self.selections]
            for rate in part.rates or (Rates(rank=0),):
                cluster.limit(rate)
                cluster.call("calibrate")
                for factor in self.scoring:
                    seconds = factor * self._gather_s(part, rate)
                    cluster.call("score", seconds)
                    for case in cases:
                        steps: dict[str, list[float]] = {scheme: [] for scheme in schemes}
                        used: dict[str, str] = {}
                        for _ in range(self.rounds):
                            for scheme in schemes:
                                found: list[StepReport] = cluster.call("step", case.selection, scheme, False)
                                steps[scheme].append(max(report.wall_s for report in found))
                                used[scheme] = found[0].used.value
                        self._note(part, rate, (factor, seconds), case.selection, steps, used)

    def _gather_s(self, part: Part, rate: Rates) -> float:
        """Return the seconds that keys and values of all other ranks take over the slowest link."""
        received = self.shape.seq_len * (part.ranks - 1) / part.ranks * self.shape.kv_token_bytes
        slowest = min(rate.rank or 10_000, rate.nodes or 10_000)
        return received / (slowest * MBIT)

    def _note(
        self,
        part: Part,
        rate: Rates,
        scoring: tuple[float, float],
        selection: str,
        steps: dict[str, list[float]],
        used: dict[str, str],
    ) -> None:
        medians = {scheme: sorted(times)[len(times) // 2] for scheme, times in steps.items()}
        for scheme, times in steps.items():
            self.rows.append(
                {
                    "part": part.name,
                    "rate_mbit": rate.rank,
                    "node_rate_mbit": rate.nodes,
                    "scoring_over_gather": scoring[0],
                    "scoring_s": scoring[1],
                    "selection": selection,
                    "scheme": scheme,
                    "used": used[scheme],
                    "step_s": times,
                    "step_s_median": medians[scheme],
                    "over_rival": medians[RIVAL] / medians[scheme],
                }
            )
        ratios = "  ".join(f"{s} {medians[RIVAL] / m:.2f}" for s, m in medians.items())
        self.say(f"{part.name}, f {selection}, scoring {scoring[1]:.2f} s: {ratios}")


def markdown(result: dict[str, Any]) -> str:
    """Write the table: speed relative to the rival."""
    rows, names = result["rows"], list(dict.fromkeys(row["scheme"] for row in result["rows"]))
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (
            row["part"],
            row["rate_mbit"],
            row["node_rate_mbit"],
            row["scoring_over_gather"],
            row["selection"],
        )
        cells.setdefault(key, {})[row["scheme"]] = row
    lines = [("ranks", "Mbit/s", "between", "scoring", "f", f"{RIVAL} s", *names[1:])]
    for (part, rate, nodes, factor, selection), found in cells.items():
        speeds = (f"{found[name]['over_rival']:.2f}" if name in found else "-" for name in names[1:])
        rival = f"{found[RIVAL]['step_s_median']:.2f}"
        lines.append((part, str(rate), str(nodes or "-"), f"{factor:g}", selection, rival, *speeds))
    return "\n".join(
        [
            "# The exchange under the scoring of blocks",
            "",
            f"`{result['command']}`, {result['machine']['cpu']}, {result['machine']['cores']} cores, commit "
            f"{result['machine']['commit']}, {result['rounds']} rounds, {result['seconds']:.0f} s.",
            "",
            "Forward and backward of one MSA layer's exchange and attention over links of limited rate, in "
            "network namespaces. In the place of scoring every rank sleeps: `scoring` is that time over the "
            "time of all keys and values over the slowest link. Columns of schemes: speed relative to "
            f"`{RIVAL}`, whose gather starts before the scoring; medians.",
            "",
            *table(lines),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and write exchange_scoring.json and exchange_scoring.md; exit codes as of the run command."""
    try:
        arguments = parse(argv)
        if not arguments.unshaped:
            namespaces.enter_own_network()
        start, measurement = time.monotonic(), ScoringMeasurement(arguments)
        for name in arguments.parts:
            part = make_part(name, arguments.rates, arguments.node_rates)
            measurement.run(part)
    except ValueError as error:
        print(f"exchange benchmark: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RankError, TimeoutError) as error:
        print(f"exchange benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    result = {
        "command": command("benchmarks.exchange.scoring", sys.argv[1:] if argv is None else argv),
        "seconds": time.monotonic() - start,
        "machine": machine(),
        "rounds": arguments.rounds,
        "rows": measurement.rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "exchange_scoring.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "exchange_scoring.md").write_text(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
