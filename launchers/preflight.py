"""Run msa-preflight: look at all nodes of a job before it trains, and name those that are bad.

A job of 32 nodes that dies an hour later of one bad node has wasted 32 node hours; this takes seconds. Node 0
hears the others one after the other: on N nodes it takes N - 1 connections, 3 pings each, and 2 (N - 1) MiB
through its link (31 connections and 62 MiB on 32 nodes, 0.05 s at 10 Gbit/s). Nodes that never come cost
--timeout-s once, all together; the import of torch for the all-reduce costs each node some seconds.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from launchers.cli.command_line import Parser, number, run_command
from launchers.cli.output import say
from launchers.local.job_environment import expand_nodelist, slurm_generation, slurm_port
from launchers.slurm.job_token import read_token, token_path
from launchers.slurm.node_facts import Facts, Wanted, complaints, gather_facts
from launchers.slurm.node_links import Answer, Head, answer_head, slow_nodes
from msa_train.config import one_line, printable
from msa_train.runtime.atomic_files import new_file

BAD_NODES = Path("slurm") / "bad_nodes"
DESCRIPTION = """\
Run by srun with one task per node, before training. Every node says what it has and writes into run_dir; the
first one compares clocks and links; then all of them time an all-reduce. Bad nodes are named in the output
and, for the batch script, in RUN_DIR/slurm/bad_nodes; the exit code is 1 then."""


@dataclass(kw_only=True, slots=True)
class Place:
    """Locate this node among those of the step."""

    rank: int
    "of the node, from 0; node 0 hears the others"
    nodes: list[str]
    "host names by rank"
    port: int
    "of node 0 for the checks; the next one is that of the all-reduce's store"


class NodesAreBadError(ValueError):
    """Report that some nodes should not be trained on; the text names them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 1 if a node is bad, 2 for bad input, 130 if interrupted.
    """
    bad: list[str] = []

    def run() -> None:
        try:
            _check(_parser().parse_args(argv), find_place())
        except NodesAreBadError as error:
            bad.append(str(error))
            say(f"msa-preflight: {one_line(error)}", error=True)

    return run_command("msa-preflight", run) or int(bool(bad))


def find_place() -> Place:
    """Read this node's place from Slurm's variables; without them it is alone.

    Example: SLURM_PROCID=1, SLURM_STEP_NODELIST=n[1-2], job 12345, step 0 -> rank 1 of n1, n2, port 22345.

    Raises:
        ValueError: in a step that has no list of nodes.
    """
    environ = os.environ
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return Place(rank=0, nodes=[os.uname().nodename], port=0)
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ValueError(
            "SLURM_STEP_NODELIST=: is empty, and a step must list its nodes; start this by srun, or unset "
            "SLURM_PROCID to check this machine alone"
        )
    nodes = expand_nodelist(listed)
    port = slurm_port(environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"])
    return Place(rank=int(environ["SLURM_PROCID"]), nodes=nodes, port=port)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="msa-preflight", description=DESCRIPTION)
    parser.add_argument(
        "--run-dir", required=True, metavar="DIR", help="that every node must be able to write"
    )
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="of a node (0)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="of a node (1)")
    parser.add_argument(
        "--memory-gb", type=number, default=0.0, metavar="X", help="free memory of a node (0)"
    )
    parser.add_argument(
        "--clock-s", type=number, default=2.0, metavar="X", help="largest error of a clock (2)"
    )
    parser.add_argument("--megabytes", type=number, default=16.0, metavar="X", help="of the all-reduce (16)")
    parser.add_argument("--timeout-s", type=number, default=60.0, metavar="X", help="for an answer (60)")
    return parser


def _check(arguments: argparse.Namespace, place: Place) -> None:
    """Check this node, then the links, then a collective; each only where the one before was good.

    A collective on a bad node hangs until its timeout and names nobody: so it comes last, among nodes that
    have all answered.
    """
    wanted = Wanted(
        gpus=arguments.gpus, cpus=arguments.cpus, memory_gb=arguments.memory_gb, clock_s=arguments.clock_s
    )
    # half the time for the file system, so that a node whose file system hangs still says so in time
    facts = gather_facts(arguments.run_dir, count_gpus=wanted.gpus > 0, timeout_s=arguments.timeout_s / 2)
    run_dir, timeout_s = Path(arguments.run_dir), arguments.timeout_s
    token = _token(facts, place, run_dir, timeout_s) if len(place.nodes) > 1 else b""
    if place.rank == 0:
        _judge(facts, wanted, place, run_dir, timeout_s, token)
    elif not _answer(facts, place, run_dir, timeout_s, token):
        return
    if len(place.nodes) > 1:
        seconds = _time_all_reduce(place, arguments.megabytes, timeout_s)
        if place.rank == 0:
            rate = arguments.megabytes / 1000 / seconds
            say(f"all-reduce of {arguments.megabytes:g} MB: {seconds * 1000:.0f} ms ({rate:.2f} GB/s)")


def _token(facts: Facts, place: Place, run_dir: Path, timeout_s: float) -> bytes:
    """Read the secret that tells this job's nodes from strangers; rank 0 makes it where there is none.

    It lies in run_dir, since all nodes share that and strangers do not. The batch script makes it beforehand;
    by hand rank 0 does.
    """
    path = token_path(run_dir, slurm_generation(os.environ))
    try:
        return read_token(path, create=place.rank == 0, timeout_s=timeout_s / 2)
    except OSError as error:
        # the first node then misses this one, and says that it is silent
        raise NodesAreBadError(
            f"{facts.node}: run_dir={run_dir}: cannot be used here ({error.strerror}: {path}); "
            "it must be on a file system that all nodes share"
        ) from error


def _judge(facts: Facts, wanted: Wanted, place: Place, run_dir: Path, timeout_s: float, token: bytes) -> None:
    """Hear all other nodes, print a line for each and name the bad ones; for rank 0.

    Raises:
        NodesAreBadError: if any is bad, after all of them were told to leave.
    """
    answers = {0: Answer(facts=facts, clock_s=0.0, echo_s=0.0)}
    head = Head(place.port, len(place.nodes), token) if len(place.nodes) > 1 else None
    if head is not None:
        answers |= head.ask_all(timeout_s)
    links = {place.nodes[rank]: answer.echo_s for rank, answer in answers.items() if rank}
    slow, bad = slow_nodes(links, wanted.slow_factor), {}
    for rank, node in enumerate(place.nodes):
        if rank not in answers:
            bad[node] = [f"silent for {timeout_s:g} s"]
            continue
        answer = answers[rank]
        found = complaints(answer.facts, wanted, answer.clock_s)
        if node in slow:
            found.append(f"its link took {answer.echo_s * 1000:.0f} ms for 1 MiB and back, others far less")
        if found:
            bad[node] = found
        say(_line(node, answer))
    # before the error: nodes that hear nothing would wait for twice the timeout
    if head is not None:
        head.tell_all(go_on=not bad)
    if bad:
        texts = [f"{node}: {', '.join(found)}" for node, found in bad.items()]
        _name(run_dir, texts)
        raise NodesAreBadError(f"{len(bad)} of {len(place.nodes)} nodes are bad: {'; '.join(texts)}")


def _line(node: str, answer: Answer) -> str:
    """Describe a node.

    Example: "n2: 8 GPUs, 64 CPUs, 480 GB free, clock +0.002 s, link 1.9 ms, run_dir written in 12 ms".
    """
    facts = answer.facts
    return (
        f"{node}: {facts.gpus} GPUs, {facts.cpus} CPUs, {facts.memory_gb:.0f} GB free, "
        f"clock {answer.clock_s:+.3f} s, link {answer.echo_s * 1000:.1f} ms, "
        f"run_dir written in {facts.write_s * 1000:.0f} ms"
    )


def _answer(facts: Facts, place: Place, run_dir: Path, timeout_s: float, token: bytes) -> bool:
    """Answer node 0 and return whether to go on; for the other ranks.

    Raises:
        NodesAreBadError: if node 0 cannot be reached.
    """
    head = place.nodes[0]
    try:
        return answer_head(head, place.port, place.rank, facts, token, timeout_s)
    except OSError as error:
        # this node alone may be cut off: the first one then names it, and knows better
        if not (run_dir / BAD_NODES).exists():
            _name(run_dir, [f"{head}: cannot be reached from {facts.node}: {error}"])
        raise NodesAreBadError(
            f"{head}, the first node, cannot be reached from {facts.node}: {error}"
        ) from error


def _name(run_dir: Path, texts: Sequence[str]) -> None:
    """Write bad_nodes, a line "node: what is wrong" for each.

    A file, for the batch script cuts the names off it for ExcNodeList, and Slurm may lose what is printed by
    a step that it ends.
    """
    path = run_dir / BAD_NODES
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        # a line break in what a node says would put another name into the list of those to exclude
        file.write("".join(f"{printable(text)}\n" for text in texts))


def _time_all_reduce(place: Place, megabytes: float, timeout_s: float) -> float:
    """Time an all-reduce over one GPU of each node, or over its CPU.

    One rank per node: the network is what is looked at, and 32 ranks meet sooner than 256.

    Args:
        place: of this node.
        megabytes: of the tensor, 10**6 bytes each.
        timeout_s: longest wait for the others and for each collective.

    Returns:
        Seconds of the fastest of three: the first one also builds the connections.

    Raises:
        NodesAreBadError: if it does not come about.
    """
    # takes seconds; a bad node is named before
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", 0), "nccl"
    limit = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(place.nodes[0], place.port + 1, len(place.nodes), place.rank == 0, limit)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=len(place.nodes), timeout=limit
        )
        data, times = torch.ones(int(megabytes * 1e6) // 4, device=device), []
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(data)
            # on a GPU the call returns before it is done
            data[0].item()
            times.append(time.perf_counter() - start)
        # rank 0 hosts the store: it must not leave while others are still reading it
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        text = " ".join(str(error).split())[:300]
        raise NodesAreBadError(f"{place.nodes[place.rank]}: the all-reduce failed: {text}") from error
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
