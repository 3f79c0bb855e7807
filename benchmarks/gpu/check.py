"""Check every kernel against fp64 on fresh inputs, worst row, before anything is timed.

Attention may have twice the error of plain torch in the same dtype; the selection may differ from the exact
one only where two scores are closer than rounding.
"""

from collections.abc import Callable, Mapping

from benchmarks.gpu.check_attention import attention_cases
from benchmarks.gpu.check_decode import decode_cases
from benchmarks.gpu.check_dense_kl import dense_kl_cases
from benchmarks.gpu.check_selection import selection_cases
from benchmarks.gpu.comparison import Check, failed
from benchmarks.gpu.problem import LayerSizes, Tensors

__all__ = ["GROUPS", "Cases", "Check", "check_cases", "run_checks"]

# By name; every case makes its own inputs, so that none needs another to have run.
Cases = Mapping[str, Callable[[], list[Check]]]
# What a measurement can ask to have passed. The cases of attention are many: in two processes.
GROUPS = ("selection", "attention", "dense_kl", "decode")


def check_cases(
    group: str, tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int, num_queries: int
) -> Cases:
    """Return the cases of one of GROUPS.

    Args:
        group: one of GROUPS.
        tensors, sizes, kernel: device, dtype and seed; shape of the layer; what is checked.
        seq_len: keys. num_queries: as many queries, at random positions.
    """
    size = {"seq_len": seq_len, "num_queries": num_queries}
    if group == "selection":
        return selection_cases(tensors, sizes, kernel, **size)
    if group == "attention":
        return attention_cases(tensors, sizes, kernel, **size)
    if group == "dense_kl":
        return dense_kl_cases(tensors, sizes, kernel, num_tokens=num_queries)
    return decode_cases(tensors, sizes, kernel, seq_len=seq_len)


def run_checks(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int, num_queries: int
) -> list[Check]:
    """Make all checks; a kernel that cannot run is a check that failed, and the others go on."""
    found: list[Check] = []
    for group in GROUPS:
        cases = check_cases(group, tensors, sizes, kernel, seq_len=seq_len, num_queries=num_queries)
        for name, case in cases.items():
            try:
                found += case()
            except Exception as error:
                # whatever a compiler or driver says: a first run on new hardware should report all of it
                found.append(failed(name, f"{type(error).__name__}: {error}".splitlines()[0]))
    return found
