"""Files as damage, mistakes and malice leave them, from good ones; the same for the same random generator."""

import json
from copy import deepcopy
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 10**12, 2**31, 2**64, 1e308, -0.0, 0.5, float("nan"), float("inf")),
    *(
        "",
        "x",
        "64",
        "0.5",
        "\x1b[2J\x1b]0;x\x07",
        "a\0b",
        "../../etc/passwd",
        "/dev/zero",
        "\u202e",
        "\ud800",
    ),
    *([], {}, [[1]], [None], ["x"] * 3, {"x": {"y": [1]}}, {"": None}),
)
_PIECES = (b"\0", b"\xff\xfe", b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"\n", b"NaN")


def mutated_json(rng: Random, value: Any) -> bytes:
    """One to three values, names or bytes of a JSON document are others."""
    copy = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, copy)
    text = json.dumps(copy).encode()
    return damaged(rng, text) if rng.random() < 0.3 else text


def damaged(rng: Random, content: bytes) -> bytes:
    """Flipped bits, a cut, bytes in between, zeros to the end, or a part said twice."""
    data, kind = bytearray(content), rng.randrange(8)
    at = rng.randrange(len(data) + 1)
    if kind < 4 and data:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data[at:at] = rng.choice(
            (b"\0", b"\xff\xfe", b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"\n", b"NaN")
        )
    elif kind == 6:
        data[at:] = bytes(len(data) - at)
    else:
        data[at:at] = data[max(0, at - rng.randrange(1, 200)) : at]
    return bytes(data)


def _change(rng: Random, value: Any) -> None:
    """Change a random part of a tree in place."""
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        what = rng.randrange(10)
        if what == 0:
            del value[key]
        elif what == 1 and isinstance(value, dict):
            value[str(rng.choice(ODD))] = value.pop(key)
        elif what == 2 and isinstance(value, dict):
            value[str(rng.choice(ODD))] = deepcopy(rng.choice(ODD))
        elif what == 3 and type(value[key]) in (int, float):
            value[key] = rng.choice(
                (-value[key], value[key] + 1, value[key] * 2, str(value[key]), [value[key]])
            )
        else:
            value[key] = deepcopy(rng.choice(ODD))
        return
