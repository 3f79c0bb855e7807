"""Trace one rank in a process of its own: a request as JSON on stdin, the report as JSON on stdout.

    {"config": {...}, "world_size": 256, "place": {"pp_rank": 1}, "assumptions": {"fetched_share": 0.2},
     "with_save": true}

A list of requests is answered by a list of reports; importing torch and Megatron, 5 s, is then paid once.

Process groups and names of torch are replaced while it runs, so nothing else should live in this process.
"""

import contextlib
import json
import logging
import sys
import warnings


def main() -> None:
    """Read the request, trace, print the report."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    request = json.load(sys.stdin)
    # what libraries print must not end up in the report
    with contextlib.redirect_stdout(sys.stderr):
        from msa_train.plan.trace.request import answer

        report = [answer(one) for one in request] if isinstance(request, list) else answer(request)
    json.dump(report, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
