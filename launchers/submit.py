"""Run msa-submit: check a run, write its batch script, give it to Slurm as a job of several nodes.

All of it happens on the login node: a wrong setting is refused here and not after hours in the queue.
"""

import sys
from collections.abc import Sequence

from launchers.cli.command_line import run_command
from launchers.cli.output import say
from launchers.hydra_config.compose_cluster import compose_cluster
from launchers.hydra_config.options import CLUSTER, group_options
from launchers.slurm.submission import read_request, submit
from msa_train.config import check_time

USAGE = """\
msa-submit run=NAME cluster=NAME nodes=N time=HH:MM:SS [KEY=VALUE ...] [--dry-run]
msa-submit -m run=NAME cluster=NAME nodes=N time=HH:MM:SS KEY=VALUE,VALUE [...]

Checks a run as msa-train does, writes the batch script with code version and configuration into
run_dir/slurm, and submits it. The job saves before its time is up, requeues itself and goes on; msa-status
RUN_DIR shows how far it is. With -m, a job for every combination of values.

options:
  --dry-run         print the script, write and submit nothing
  --config-dir DIR  take options of the groups, clusters too, from DIR/cluster, DIR/run ...; may be repeated
  --help            print this text and stop

clusters (conf/cluster; cluster.KEY=VALUE changes one of its keys):
{clusters}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input or a job that Slurm refuses, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command("msa-submit", lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    """Print the help, or check the cluster and submit a job or a sweep."""
    if not arguments or {"--help", "-h"} & set(arguments):
        table = "\n".join(f"  {name:<14} {text}" for name, text in group_options(CLUSTER).items())
        say(USAGE.format(clusters=table), lines=True)
        return
    request = read_request(arguments)
    cluster = compose_cluster(request.cluster, request.of_cluster, request.config_dirs)
    # before the run is composed: that of a sweep is composed once per combination
    check_time(request.time, cluster)
    if request.sweep:
        # Hydra's own entry point is not needed for a single job
        from launchers.slurm.sweep import submit_sweep

        submit_sweep(request, cluster)
        return
    submit(request, cluster)


if __name__ == "__main__":
    sys.exit(main())
