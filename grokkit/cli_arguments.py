"""Arguments that several commands read alike."""

import argparse
import re

from grokkit.checkpoint import Checkpoint, open_checkpoint
from grokkit.zoo import shipped

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


def mesh_shape(text: str) -> tuple[int, int]:
    """`"1,8"` as (data, model)."""
    try:
        data, model = map(int, text.split(","))
    except ValueError:
        data = model = 0
    if data < 1 or model < 1:
        raise argparse.ArgumentTypeError(
            f"expected two numbers of devices, at least 1 each, as in 1,8; found {text!r}"
        )
    return data, model


def open_named(source: str) -> Checkpoint:
    """The checkpoint of a shipped model, or in a directory."""
    return open_checkpoint(shipped(source) or source)
