"""Plan what a run consists of, in the order of its value: a run may be cut short at any time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.rows import CORRELATED, INDEPENDENT

SEQ_LENS = (2**15, 2**17, 2**19, 2**20)
# The length that is measured first and whole
MAIN_SEQ_LEN = 2**17
FLASH_MSA_SEQ_LENS = (2**14, 2**15)
CHECK_GROUPS = ("selection", "attention", "dense_kl", "decode")
COMPILE_SHARES = 8
# For the rates at the end
RESERVE_S = 10.0
# Longest time of one step before its process is taken for hung
LIMIT_S = 60.0
# Dense training at 1M
LONG_LIMIT_S = 90.0
# A dozen kernels, one after the other, while other processes compile too
COMPILE_LIMIT_S = 180.0


@dataclass(frozen=True, slots=True)
class PartSpec:
    """Describe a part, whose steps one child process at a time makes."""

    name: str
    """Words joined by dashes."""
    kind: str
    """Kind of work, which `make_part` in child.py knows."""
    seq_len: int = 0
    """Tokens; 0 where the part has no length."""
    detail: str = ""
    """Group of checks, kind of selection, share of the compilations, before or after."""
    limit_s: float = LIMIT_S
    """Longest time of a step before its process is taken for hung."""
    reserve_s: float = RESERVE_S
    """Nothing of it is begun when fewer seconds of the run's time are left."""
    beside_others: bool = False
    """It may run while others do: it takes no times."""

    @property
    def is_timed(self) -> bool:
        """Tell whether it takes times of operators or rivals."""
        return self.kind not in ("compile", "checks", "rates")

    def matches(self, word: str) -> bool:
        """Tell whether the word is the name, or one of the parts that dashes divide it into."""
        return word == self.name or word in self.name.split("-")

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def length(tokens: int) -> str:
    """Return tokens in words: 131072 -> 128K, 1048576 -> 1M, 100 -> 100."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def make_plan(seq_lens: Sequence[int], *, compiled: bool, variants: bool, flash_msa: bool) -> list[PartSpec]:
    """Return all parts: compilations and checks, rates, then times.

    The main length first, then ours at the longest; dense attention of long sequences late, since it takes
    longest; other tile sizes last.

    Args:
        seq_lens: tokens, any order.
        compiled: whether Triton compiles. variants: whether it is what is measured.
        flash_msa: whether that package is compared with.
    """
    lengths = sorted(set(seq_lens))
    main = MAIN_SEQ_LEN if MAIN_SEQ_LEN in lengths else lengths[0]
    longest = lengths[-1]
    others = [n for n in lengths if n not in (main, longest)]
    short, long = [n for n in others if n < main], [n for n in others if n > main]
    shares = range(COMPILE_SHARES if compiled else 0)
    parts = [
        PartSpec(f"compile-{i}", "compile", 0, str(i), COMPILE_LIMIT_S, beside_others=True) for i in shares
    ]
    parts += [PartSpec(f"checks-{group}", "checks", 0, group, beside_others=True) for group in CHECK_GROUPS]
    parts += [PartSpec("rates-before", "rates", 0, "before")]
    parts += [_ours(main), _ours(main, CORRELATED), _dense(main), _decode(main)]
    if longest != main:
        parts += [_ours(longest), _decode(longest)]
    parts += [PartSpec("topk", "topk")]
    for n in short:
        parts += [_ours(n), _dense(n), _decode(n)]
    if longest != main:
        parts += [_dense(longest), _ours(longest, CORRELATED)]
    for n in long:
        parts += [_ours(n), _dense(n), _decode(n)]
    if flash_msa:
        parts += [PartSpec(f"flash_msa-{length(n)}", "flash_msa", n) for n in FLASH_MSA_SEQ_LENS]
    if variants:
        parts += [PartSpec(f"variants-{length(n)}", "variants", n) for n in dict.fromkeys((main, longest))]
    return [*parts, PartSpec("rates-after", "rates", 0, "after", reserve_s=0.0)]


def choose(parts: list[PartSpec], words: Sequence[str]) -> list[PartSpec]:
    """Return the parts that any of the words matches, and those that every measurement needs.

    Raises:
        ValueError: a word matches none.
    """
    for word in words:
        if not any(part.matches(word) for part in parts):
            names = " ".join(part.name for part in parts)
            raise ValueError(f"--parts={word}: must be (a piece of) one of {names}")
    chosen = [part for part in parts if any(part.matches(word) for word in words)]
    timed = any(part.is_timed for part in chosen)
    # nothing is timed without knowing whether it is right, and what the device can do
    needed = [part for part in parts if timed and part.kind in ("checks", "rates")]
    return [part for part in parts if part in chosen or part in needed]


def _ours(seq_len: int, selection: str = INDEPENDENT) -> PartSpec:
    name = "ours" if selection == INDEPENDENT else selection
    return PartSpec(f"{name}-{length(seq_len)}", "ours", seq_len, selection)


def _dense(seq_len: int) -> PartSpec:
    return PartSpec(f"dense-{length(seq_len)}", "dense", seq_len, limit_s=LONG_LIMIT_S)


def _decode(seq_len: int) -> PartSpec:
    return PartSpec(f"decode-{length(seq_len)}", "decode", seq_len)
