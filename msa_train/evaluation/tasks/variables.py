"""Set variables to each other along a chain, and ask for all that hold a value.

Structure of RULER's vt: one chain of 4 hops, so 5 names of 5 capitals, in noise; lines of the chain stand in
order before distinct random lines. A short worked example comes first, of 3-letter names and the value 12345.
"""

import itertools
import string
from dataclasses import dataclass

from msa_train.evaluation.tasks.sample import Draft, Draw, TooShortError
from msa_train.evaluation.text.wording import Wording, fill

_EXAMPLE_TOKENS, _EXAMPLE_VALUE = 500, "12345"


@dataclass(frozen=True, slots=True)
class VariableTask:
    """Hold the length of the chain."""

    num_hops: int = 4
    "assignments of a variable to another one"

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft. Example: X set to 71903, Y to X: names X and Y hold 71903."""
        wording = draw.material.wording
        names, value = self._names(draw, 5), str(draw.rng.randint(10_000, 99_998))
        before, after, prefix = wording.variables.parts(query=value, num_v=str(len(names)))
        example = self._example(draw, wording)
        lines = _chain(wording, names, value)
        left = draw.left([example, before, *lines, after], prefix, names)
        units = draw.fill(lambda _number: f"{wording.noise}\n", left, least=len(lines))
        places = sorted(draw.rng.sample(range(len(units)), len(lines)))
        pieces, found = [example, before], []
        for number, unit in enumerate(units):
            if number in places:
                answer = places.index(number)
                found.append((len(pieces), answer))
                pieces.append(lines[answer])
            pieces.append(unit)
        return Draft([*pieces, after], prefix, names, found, ordered=False)

    def _names(self, draw: Draw, size: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < self.num_hops + 1:
            found["".join(draw.rng.choices(string.ascii_uppercase, k=size))] = None
        return list(found)

    def _example(self, draw: Draw, wording: Wording) -> str:
        """Write a worked example of at most 500 tokens; none where it would take more than a quarter."""
        names = self._names(draw, 3)
        before, after, prefix = wording.variables.parts(query=_EXAMPLE_VALUE, num_v=str(len(names)))
        lines = _chain(wording, names, _EXAMPLE_VALUE)
        text = f"{before}{wording.noise}\n{''.join(lines)}{after}{prefix} {', '.join(names)}\n\n"
        tokens = draw.counts.total([text])
        return text if tokens <= min(_EXAMPLE_TOKENS, draw.length // 4) else ""


def _chain(wording: Wording, names: list[str], value: str) -> list[str]:
    """Write the assignments: the first name to the value, each other one to the name before."""
    first, later = wording.assignment
    lines = [fill(first, {"name": names[0], "value": value})]
    lines += [fill(later, {"name": b, "source": a}) for a, b in itertools.pairwise(names)]
    if len(set(lines)) < len(lines):
        raise TooShortError("has assignments that are alike")
    return [f"{line}\n" for line in lines]
