"""Read numbers of tokens from a command line."""

import argparse

# binary, as sequence lengths are: 192K is 196608
UNITS = {"K": 2**10, "M": 2**20}


def token_count(text: str) -> int:
    """Read a number of tokens: 196608 or 192K -> 196608, 1M -> 1048576."""
    unit = UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a positive number of tokens such as 196608, 192K or 1M"
        )
    return int(digits) * unit
