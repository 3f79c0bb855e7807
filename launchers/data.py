"""Run msa-data: count documents by length, and make long ones honestly."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.cli.command_line import Parser, run_command
from launchers.cli.output import say
from launchers.cli.token_count import token_count
from launchers.hydra_config.compose import compose_run
from launchers.hydra_config.options import group_options
from msa_train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from msa_train.config.mixture.rules import check_mixture

if TYPE_CHECKING:
    from msa_train.data.stats import StageReading

DESCRIPTION = "Counts documents by length, joins texts to long ones, writes ones that teach to look back."
EPILOG = """\
examples:
  msa-data stats /data/books /data/web.jsonl.zst --seq-len 1M     # documents and tokens by length
  msa-data stats run=m3_1m data.corpus=/data/books                # what can its stages learn from it?
  msa-data prepare /data/repos/* --join imports --output /data/long_code
  msa-data prepare /data/books --join chapters --output /data/long_books
  msa-data synthesize --lengths 32K,256K,1M --documents 2000 --output /data/recall"""
LARGEST_VOCAB = 2**26
"where no model is given: any tokenizer's"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input or files, 130 if interrupted.
    """

    def run() -> int:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)

    return run_command("msa-data", run)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="msa-data", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats|prepare|synthesize")
    stats = commands.add_parser("stats", help="documents and tokens by length, and what stages can learn")
    stats.add_argument(
        "given",
        nargs="+",
        metavar="CORPUS|KEY=VALUE",
        help=f"corpora, or settings as for msa-train; runs: {', '.join(group_options('run'))}",
    )
    stats.add_argument("--tokenizer", default="bytes", metavar="PATH", help="with corpora (bytes)")
    stats.add_argument("--text-field", default="text", metavar="KEY", help="with corpora of JSONL (text)")
    stats.add_argument("--seq-len", type=token_count, metavar="N", help="with corpora: of a stage, 192K, 1M")
    stats.add_argument("--cache-dir", metavar="PATH", help="where tokens are kept")
    stats.add_argument("--json", action="store_true", help="print JSON instead of tables")
    stats.set_defaults(run=_stats)
    prepare = commands.add_parser("prepare", help="join texts to long documents, with a record of how")
    prepare.add_argument("paths", nargs="+", metavar="PATH", help="a repository, a folder of books, or JSONL")
    prepare.add_argument(
        "--join",
        required=True,
        choices=["imports", "paths", "chapters", "topic"],
        help="files of a repository as they import one another or by path; chapters by number; like topics",
    )
    prepare.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder for JSONL")
    prepare.add_argument("--text-field", default="text", metavar="KEY", help="of JSONL (text)")
    prepare.add_argument("--group-field", default="", metavar="KEY", help="of JSONL: repository or book")
    prepare.add_argument("--name-field", default="", metavar="KEY", help="of JSONL: path or chapter")
    prepare.add_argument(
        "--max-bytes", type=token_count, default=16 << 20, metavar="N", help="of a document (16M)"
    )
    prepare.add_argument(
        "--window", type=int, default=50_000, metavar="N", help="topic: texts that are compared (50000)"
    )
    prepare.set_defaults(run=_prepare)
    _add_synthesize(commands.add_parser("synthesize", help="write documents like the tasks of msa-eval"))
    return parser


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder for JSONL")
    parser.add_argument(
        "--tasks", default="recall", metavar="NAMES", help="recall, or tasks of msa-eval, by commas (recall)"
    )
    parser.add_argument("--lengths", required=True, metavar="N,N", help="tokens of documents, as 32K,1M")
    parser.add_argument("--documents", required=True, type=int, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the documents (0)")
    parser.add_argument("--tokenizer", default="bytes", metavar="PATH", help="that counts tokens (bytes)")
    parser.add_argument("--haystack", default="", metavar="PATH", help="text around (sentences are built)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that write at a time (1)")
    parser.set_defaults(run=_synthesize)


def _synthesize(arguments: argparse.Namespace) -> int:
    """Write documents, and say what was written."""
    from msa_train.data.long_documents.write import Prepared, write_corpus
    from msa_train.evaluation.training_documents import DocumentRequest, request_summary, write_documents

    request = DocumentRequest(
        tasks=tuple(name.strip() for name in arguments.tasks.split(",") if name.strip()),
        lengths=_lengths(arguments.lengths),
        documents=arguments.documents,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
        haystack=arguments.haystack,
        processes=arguments.processes,
    )
    made = write_corpus(
        arguments.output,
        write_documents(request),
        Prepared(),
        lambda: {"request": request_summary(request)},
        "--documents",
    )
    say(f"{made.documents:,} documents, {made.num_bytes / 1e6:.1f} MB, the longest {made.longest:,} bytes")
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(token_count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--lengths={error}") from error


def _prepare(arguments: argparse.Namespace) -> int:
    """Make long documents, and say what was made."""
    from msa_train.data.long_documents.make import Join, Request, prepare_long
    from msa_train.data.long_documents.parts import Fields

    fields = Fields(text=arguments.text_field, group=arguments.group_field, name=arguments.name_field)
    request = Request(
        paths=arguments.paths,
        join=Join(arguments.join),
        fields=fields,
        max_bytes=arguments.max_bytes,
        window=arguments.window,
    )
    made = prepare_long(request, arguments.output)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(made.made_by.items()))
    say(
        f"{made.documents:,} documents of {made.parts:,} texts, {made.num_bytes / 1e6:.1f} MB, the longest "
        f"{made.longest / 1e6:.2f} MB ({kinds})"
    )
    for reason, count in sorted(made.left_out.items()):
        say(f"left out: {count:,} {reason}")
    say(f"count its tokens: msa-data stats {shlex.quote(str(arguments.output))} --seq-len 1M")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    """Print what there is, and what each stage can learn from it."""
    from msa_train.data.stats import bucket_rows, longest_rows, making_rows, read_lengths, stage_readings

    settings = [text for text in arguments.given if "=" in text]
    corpora = [text for text in arguments.given if "=" not in text]
    if settings and corpora:
        raise ValueError(
            f"{corpora[0]}: is not of the form key=value; give corpora, or a run and its settings, not both"
        )
    config = compose_run(settings) if settings else _config_of(corpora, arguments)
    if arguments.cache_dir:
        config.data.cache_dir = arguments.cache_dir
    check_mixture(config)
    sources = read_lengths(config, log=lambda line: say(f"msa-data: {line}", error=True))
    if corpora:
        # nobody has weighed them: each gives what it has
        for name, source in config.data.mixture.items():
            source["weight"] = float(sources[name].lengths.sum())
    tables = [bucket_rows(sources), making_rows(sources), longest_rows(sources)]
    readings = stage_readings(config, sources) if settings or arguments.seq_len else []
    if arguments.json:
        names = ("buckets", "made_by", "longest")
        data: dict[str, Any] = dict(zip(names, tables, strict=True))
        data["stages"] = [asdict(reading) | {"told": reading.sentences()} for reading in readings]
        say(json.dumps(data, indent=1), lines=True)
    else:
        _print(tables, readings)
    return 0


def _print(tables: Sequence[list[dict[str, Any]]], readings: "Sequence[StageReading]") -> None:
    """Print tables one after another, then a table and sentences for each stage."""
    from msa_train.data.stats import table

    buckets, makings, longest = tables
    say("\n".join(table(buckets)), lines=True)
    if any(row["made_by"] != "as_is" for row in makings):
        say("\n" + "\n".join(table(makings)), lines=True)
    say("\nlongest\n" + "\n".join(table(longest)), lines=True)
    for reading in readings:
        rows = [{"stage": reading.name, **asdict(part)} for part in reading.parts]
        say("\n" + "\n".join([*table(rows), *reading.sentences()]), lines=True)


def _config_of(corpora: Sequence[str], arguments: argparse.Namespace) -> RunConfig:
    """Make a run that mixes the given corpora, named by their last parts; of one corpus without a mixture."""
    data = DataConfig(tokenizer=arguments.tokenizer, text_field=arguments.text_field)
    if arguments.seq_len:
        data.seq_len = arguments.seq_len
    if len(corpora) == 1:
        data.corpus = corpora[0]
    for corpus in corpora if len(corpora) > 1 else ():
        # books.jsonl.zst -> books; a second one of that name gets a number
        name = re.sub(r"\W+", "_", Path(corpus).name.split(".")[0]).strip("_") or "source"
        name = name if name[0].isalpha() else f"source_{name}"
        taken = [other for other in data.mixture if other == name or other.startswith(f"{name}_")]
        data.mixture[f"{name}_{len(taken) + 1}" if taken else name] = {"corpus": corpus}
    model, train = ModelConfig(vocab_size=LARGEST_VOCAB), TrainConfig(steps=1)
    return RunConfig(model=model, data=data, train=train)


if __name__ == "__main__":
    sys.exit(main())
