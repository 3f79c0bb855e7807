"""Write a long conversation in which some requests are the same, and ask for the answer to the i-th of them.

Structure of MRCR: many requests "write KIND about TOPIC", 2, 4 or 8 of them identical, each answered in
another way; the last one asks to repeat the i-th of these answers behind a random code. Passages are running
text.
"""

import random
import string
from dataclasses import dataclass

from msa_train.evaluation.tasks.sample import Draft, Draw
from msa_train.evaluation.text.haystacks import Reader
from msa_train.evaluation.text.listed import listed

_KINDS = listed("a note, a letter, a story, a report, a speech, a diary page, a review, a sketch", ", ")
_TOPICS = listed(
    "apples birds boats bread bridges castles clocks clouds dogs doors ferries forests gardens hats "
    "horses islands kites lamps maps markets mills music rain rivers roads sand ships snow songs "
    "stones tea towers trains trees walls windows winter wool"
)
_ORDINALS = listed("first second third fourth fifth sixth seventh eighth")
_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class ConversationTask:
    """Hold how often a request comes."""

    num_same: int
    "identical requests, at most 8"

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; the reference is the whole passage."""
        rng, read = draw.rng, draw.material.sentences.start(draw.rng)
        pairs = [(kind, topic) for kind in _KINDS for topic in _TOPICS]
        rng.shuffle(pairs)
        asked, others = pairs[0], pairs[1:]
        passages = [_passage(read, number) for number in range(self.num_same)]
        which = rng.randrange(self.num_same)
        code = "".join(rng.choices(string.ascii_letters + string.digits, k=8))
        kind, topic = asked
        asks = f"repeat the {_ORDINALS[which]} time that you wrote {kind} about {topic}"
        last = f"User: Write {code}, then {asks}.\n"
        prefix = f"Assistant: {code}"
        same = [_turn(asked, passage) for passage in passages]
        left = draw.left([*same, last], prefix, [passages[which]])
        seed = rng.randrange(1 << 30)

        def other(number: int) -> str:
            pair = others[random.Random(f"{seed}/{number}").randrange(len(others))]
            return _turn(pair, _passage(read, self.num_same + number))

        units = draw.fill(other, left, least=0)
        turns = [(text, -1) for text in units]
        places = sorted(rng.sample(range(len(turns) + self.num_same), self.num_same))
        for number, place in enumerate(places):
            turns.insert(place, (same[number], number))
        pieces = [text for text, _ in turns]
        found = [(place, 0) for place, (_, number) in enumerate(turns) if number == which]
        depth = found[0][0] / max(len(turns) - 1, 1)
        return Draft([*pieces, last], prefix, [passages[which]], found, depth=depth)


def _passage(read: Reader, number: int) -> str:
    return " ".join(read(_SENTENCES * number + i) for i in range(_SENTENCES))


def _turn(asked: tuple[str, str], passage: str) -> str:
    return f"User: Write {asked[0]} about {asked[1]}.\nAssistant: {passage}\n"


CONVERSATION_TASKS = {f"mrcr_built_{count}": ConversationTask(count) for count in (2, 4, 8)}
