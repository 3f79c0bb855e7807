"""Word the tasks in our own sentences, `ruler_like`: the structure of RULER's, none of its text.

Figures that are compared with published ones need the benchmark's own wording: see `ruler_definitions`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

OWN_NAME = "ruler_like"
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Frame:
    """Hold the words around a context; names in braces are filled in."""

    template: str
    "with {context} once"
    prefix: str
    "beginning of the answer; begins with a space"

    def parts(self, **values: str) -> tuple[str, str, str]:
        """Fill in everything but the context: what comes before it, what after it, the prefix.

        Example: template "Q {query}.\\n{context}\\nGo", query="a" -> "Q a.\\n", "\\nGo".

        Raises:
            ValueError: for a field that is not given.
        """
        before, found, after = self.template.partition("{context}")
        if not found:
            raise ValueError("template: has no {context}")
        return fill(before, values), fill(after, values), fill(self.prefix, values)


def fill(text: str, values: Mapping[str, str]) -> str:
    """Fill in fields by name alone: what str.format would look up in them is left as it is written.

    Raises:
        ValueError: for a field that is not given.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"template: has a field {{{match[1]}}}, which this task does not fill in")
        return values[match[1]]

    return _FIELD.sub(value, text)


@dataclass(frozen=True, slots=True)
class Wording:
    """Hold the frames of all tasks."""

    name: str = OWN_NAME
    "in the results: ruler_like, or ruler where they are the benchmark's"
    digest: str = ""
    "of the files they were read from; empty for our own"
    niah: Frame = field(
        default=Frame(
            "Remember the {type_needle_v} that this text gives for names.\n{context}\n"
            "Repeat the {type_needle_v} of {query}.",
            " The {type_needle_v} of {query}:",
        )
    )
    "needles: type_needle_v (what is hidden, in the plural), query"
    needle: str = "The {type_needle_v} of {key}: {value}."
    "one needle"
    noise: str = (
        "Rain fell on the roof. The cat slept on. Nobody came by. The kettle was cold. So the day went."
    )
    "a line of the haystack that repeats itself"
    variables: Frame = field(
        default=Frame(
            "Variables are set in this text, to a number or to each other. Follow them.\n{context}\n"
            "Name all variables that hold {query}.",
            " The {num_v} variables that hold {query}:",
        )
    )
    "variable tracking: query, num_v"
    assignment: tuple[str, str] = ("let {name} = {value}.", "let {name} = {source}.")
    "lines that set a variable to a number, and to another one"
    common: Frame = field(
        default=Frame(
            "Some words of this numbered list come more often than the others.\n{context}\n"
            "Name the 10 words that come most often.",
            " The 10 most common words:",
        )
    )
    "common words"
    frequent: Frame = field(
        default=Frame(
            "Count the made-up words of this text. The dots are none.\n{context}\n"
            "Name the three words that come most often.",
            " The three most common words:",
        )
    )
    "frequent words"
    qa: Frame = field(
        default=Frame(
            "Answer from these documents, in few words.\n\n{context}\n\n"
            "Answer from the documents above, in few words.\n\nQuestion: {query}",
            " Answer:",
        )
    )
    "questions about documents: query"
    is_official: bool = False
    "needle frames have a singular that is made of the plural as the benchmark does"

    def niah_parts(self, kind: str, query: str, *, single: bool) -> tuple[str, str, str]:
        """Fill in the frame of needles for one value (single) or several; kind is a plural, as numbers."""
        template, prefix = self.niah.template, self.niah.prefix
        if single and self.is_official:
            for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
                template, prefix = template.replace(old, new), prefix.replace(old, new)
        shown = kind[:-1] if single else kind
        return Frame(template, prefix).parts(type_needle_v=shown, query=query)

    def needle_text(self, kind: str, key: str, value: str) -> str:
        """Write a needle."""
        shown = kind if self.is_official else kind[:-1]
        return fill(self.needle, {"type_needle_v": shown, "key": key, "value": value})
