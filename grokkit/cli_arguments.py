"""Arguments that several commands read alike."""

import argparse
import re

_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def n_bytes(text: str) -> int:
    """`"80GB"` as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    n = round(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected bytes, as in 80GB or 40GiB; found {text!r}")
    return n
