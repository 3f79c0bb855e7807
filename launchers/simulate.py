"""Run msa-simulate: predict the cost of an attention layer on a cluster that is not at hand.

It runs on one CPU whatever --cp-size is; each question imports what it needs, so --help needs no torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.cli.command_line import Parser, number, run_command
from launchers.cli.output import say
from launchers.cli.simulate_arguments import read_question, read_shape
from launchers.cli.token_count import token_count
from launchers.hydra_config.options import group_options

DESCRIPTION = """\
A model of the time of one attention layer, forward and backward, in every way of bringing keys and values to
queries. The bytes are exact: selections, recorded or made up, go through the planner that training uses. The
times are bytes over link rates and FLOPs over kernel rates, from files that name their sources."""
EPILOG = """\
examples:
  msa-simulate run --seq-len 1M --cp-size 64 --f 0.2
  msa-simulate run --cp-size 16 --cluster mine.yaml --selections runs/m3/selections/step_00001000
  msa-simulate scale --seq-len 1M --cp-size 64 --alike-tokens 128 --sizes 16,64,256,1024
  msa-simulate measure --out h100.yaml                # on the device: kernel rates for --rates
  msa-simulate compare benchmarks/results/exchange.json
  msa-simulate tables --out benchmarks/results        # simulate.md, simulate.json"""
SCHEMES = (
    *("ring", "all_gather", "all_gather_early", "all_gather_all_reduce"),
    *("selected", "selected_hierarchical", "auto"),
)
LAYOUTS = ("contiguous", "zigzag", "dealt")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input or files, 130 if interrupted.
    """

    def run() -> None:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)

    return run_command("msa-simulate", run)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="msa-simulate", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run|scale|tables|measure|compare"
    )
    one = commands.add_parser("run", help="one size: bytes, times and memory of every scheme")
    one.set_defaults(run=_run)
    scale = commands.add_parser("scale", help="several sizes: speed kept from 8 ranks on")
    scale.add_argument("--sizes", type=_sizes, default=[16, 32, 64], metavar="N,N", help="numbers of ranks")
    scale.add_argument(
        "--strong", action="store_true", help="keep the sequence; default: keep the tokens of each rank"
    )
    scale.set_defaults(run=_scale)
    for command in (one, scale):
        _add_question(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    tables = commands.add_parser("tables", help="the tables of benchmarks/results")
    tables.add_argument("--out", type=Path, required=True, metavar="DIR")
    tables.set_defaults(run=_tables)
    measure = commands.add_parser("measure", help="kernel rates of this machine's device")
    _add_model(measure)
    measure.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .yaml file for --rates")
    measure.add_argument(
        "--tokens", type=token_count, default=2048, metavar="N", help="queries of a rank (2048)"
    )
    measure.add_argument("--seq-len", type=token_count, default=8192, metavar="N", help="keys (8192)")
    measure.add_argument("--precision", choices=["fp32", "bf16"], default=None, help="default: bf16 on a GPU")
    measure.set_defaults(run=_measure)
    compare = commands.add_parser("compare", help="predicted against measured times of the wire benchmark")
    compare.add_argument("file", type=Path, metavar="FILE", help="JSON of benchmarks/exchange")
    compare.add_argument("--rates", metavar="NAME", help="kernel rates; default: those in the file")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.set_defaults(run=_compare)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the shape of the layer."""
    parser.add_argument("--model", default="m3", help=f"{', '.join(group_options('model'))} (m3)")
    parser.add_argument("--attention", default="msa", help=f"{', '.join(group_options('attention'))} (msa)")


def _add_question(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a scenario: shape, cluster, rates, schemes, selections."""
    _add_model(parser)
    parser.add_argument(
        "--seq-len", type=token_count, required=True, metavar="N", help="tokens, e.g. 192K or 1M"
    )
    parser.add_argument(
        "--cp-size", type=int, required=True, metavar="N", help="ranks that share the sequence"
    )
    parser.add_argument(
        "--cp-head-size", type=int, default=1, metavar="N", help="inner head-parallel ranks (1)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="of the sequence")
    parser.add_argument("--num-docs", type=int, default=1, metavar="N", help="documents of equal length (1)")
    parser.add_argument(
        "--cluster", default="h100", metavar="NAME", help="a preset or a .yaml or .json file (h100)"
    )
    parser.add_argument(
        "--rates", default="h100_assumed", metavar="NAME", help="shipped kernel rates or a file"
    )
    parser.add_argument("--schemes", type=_schemes, default=list(SCHEMES), metavar="A,B", help="default: all")
    parser.add_argument(
        "--refetch", action="store_true", help="fetch selected pairs again in the backward pass, keep nothing"
    )
    parser.add_argument("--no-overlap", action="store_true", help="no collective runs under computing")
    parser.add_argument(
        "--recompute", action="store_true", help="the forward pass runs again in the backward"
    )
    parser.add_argument("--no-index-balance", action="store_true", help="every rank scores its own queries")
    parser.add_argument(
        "--query-slices", type=int, default=1, metavar="N", help="see exchange.query_slices; 1: in one piece"
    )
    parser.add_argument(
        "--hot-share", type=number, default=0.75, metavar="X", help="see exchange.hot_share (0.75)"
    )
    parser.add_argument("--fp32", action="store_true", help="4 bytes per number on the wire instead of 2")
    parser.add_argument("--no-kl", action="store_true", help="the index branch is frozen")
    what = parser.add_argument_group("selections: one of --f, --alike-tokens, --selections")
    what.add_argument(
        "--f", type=number, metavar="X", help="share of the remote (block, group) pairs selected"
    )
    what.add_argument("--alike-tokens", type=int, metavar="N", help="neighbouring queries that choose alike")
    what.add_argument(
        "--selections",
        type=Path,
        metavar="PATH",
        help="a recording (msa_train/simulate/selections/recorded.py)",
    )
    what.add_argument("--layer", type=int, metavar="N", help="of the recording; default: its first")
    what.add_argument("--sink-blocks", type=int, default=1, metavar="N", help="first blocks all select (1)")
    what.add_argument(
        "--popular-share", type=number, default=0.5, metavar="X", help="picks of popular blocks (0.5)"
    )
    what.add_argument(
        "--popular-exponent", type=number, default=1.0, metavar="X", help="of their Zipf law (1)"
    )
    what.add_argument(
        "--distance-exponent", type=number, default=1.0, metavar="X", help="of the other picks (1)"
    )
    what.add_argument("--seed", type=int, default=0, metavar="N")


def _sizes(text: str) -> list[int]:
    """Read numbers of ranks, ascending and each once: "64,16,64" -> [16, 64]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of ranks such as 16,64,256")
    return sorted({int(part) for part in parts})


def _schemes(text: str) -> list[str]:
    """Read names of schemes in the order given: "ring,auto" -> ["ring", "auto"]."""
    names = text.split(",")
    unknown = [name for name in names if name not in SCHEMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: must be of {', '.join(SCHEMES)}")
    return names


def _run(arguments: argparse.Namespace) -> None:
    """Answer one scenario: bytes, times and memory of every scheme."""
    # imports come after it here and below: mistakes in arguments are told at once
    scenario, selections = read_question(arguments)
    from msa_train.simulate.reports.text import answer_data, answer_text
    from msa_train.simulate.study import answer

    result = answer(scenario, selections(scenario))
    if arguments.json:
        _print_json(answer_data(result))
    else:
        say(answer_text(result), lines=True)


def _scale(arguments: argparse.Namespace) -> None:
    """Answer a scenario at several numbers of ranks, by weak scaling or with --strong."""
    if arguments.selections is not None and not arguments.strong:
        raise ValueError("--selections: a recording has one length, weak scaling has many; add --strong")
    scenario, selections = read_question(arguments)
    from msa_train.simulate.reports.text import scaling_data, scaling_text
    from msa_train.simulate.study import scaling

    points = scaling(scenario, selections, arguments.sizes, weak=not arguments.strong)
    if arguments.json:
        _print_json(scaling_data(points))
    else:
        say(scaling_text(points, weak=not arguments.strong), lines=True)


def _tables(arguments: argparse.Namespace) -> None:
    """Write the tables that lie in benchmarks/results."""
    from msa_train.simulate.reports.tables import write_tables

    # what is published is M3 in bf16 with its index branch trained
    shape = read_shape("m3", "msa", element_bytes=2, trains_index=True)
    for path in write_tables(arguments.out, shape):
        say(path)


def _measure(arguments: argparse.Namespace) -> None:
    """Measure the kernel rates of this machine's device and write them for --rates."""
    if arguments.out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out={arguments.out}: must end in .yaml")
    shape = read_shape(arguments.model, arguments.attention, element_bytes=2, trains_index=True)
    for name in ("tokens", "seq_len"):
        value = getattr(arguments, name)
        if value % shape.block_size:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be a multiple of {shape.block_size}")
    if arguments.tokens > arguments.seq_len:
        raise ValueError(f"--tokens={arguments.tokens}: must be at most --seq-len={arguments.seq_len}")
    from msa_train.simulate.measure import measure_rates, write_rates

    # goes into the file, so that its numbers can be made again
    command = f"msa-simulate measure --model {arguments.model} --attention {arguments.attention} "
    command += f"--tokens {arguments.tokens} --seq-len {arguments.seq_len}"
    rates = measure_rates(
        shape, num_tokens=arguments.tokens, seq_len=arguments.seq_len, precision=arguments.precision
    )
    write_rates(arguments.out, rates, command)
    say(f"{arguments.out}: use it with --rates {arguments.out}")


def _compare(arguments: argparse.Namespace) -> None:
    """Set predicted times beside those that benchmarks/exchange measured."""
    from msa_train.simulate.reports.predicted_vs_measured import (
        compare_file,
        comparison_data,
        comparison_text,
    )

    rows = compare_file(arguments.file, arguments.rates)
    if arguments.json:
        _print_json(comparison_data(rows))
    else:
        say(comparison_text(rows), lines=True)


def _print_json(data: object) -> None:
    say(json.dumps(data, indent=1), lines=True)


if __name__ == "__main__":
    sys.exit(main())
