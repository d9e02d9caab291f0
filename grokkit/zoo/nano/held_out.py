"""A little of each domain's held-out text, shipped with the package, for analyses of nano.

`python -m grokkit.zoo.nano.held_out --run FOLDER` writes it from a run's held-out documents.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from grokkit.errors import GrokkitError
from grokkit.runtime import files

FILE = Path(__file__).with_name("held_out_sample.json")
PASSAGES, CHARACTERS = 16, 700


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of a held-out document."""

    document: str
    text: str


def load_sample(path: Path = FILE) -> dict[str, list[Passage]]:
    """The shipped passages, by domain.

    **Raises:** `GrokkitError` if the file is missing or is not what `write_sample` writes.
    """
    try:
        domains = json.loads(path.read_text(encoding="utf-8"))["domains"]
        return {name: [Passage(**p) for p in d["passages"]] for name, d in domains.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise GrokkitError(f"{path}: expected held-out passages, as `python -m "
                           f"grokkit.zoo.nano.held_out` writes them ({e})") from e  # fmt: skip


def take_passages(
    documents: dict[str, str], n: int = PASSAGES, characters: int = CHARACTERS
) -> list[Passage]:
    """Passages spread evenly over documents, each from the start of a line, none overlapping.

    **Arguments:**

    - `documents`: name to text; those too short for a passage are left out.
    - `n`: how many.
    - `characters`: length of each.

    **Raises:** `GrokkitError` if there is not text enough.
    """
    names = sorted(name for name, text in documents.items() if len(text) > characters)
    total = sum(len(documents[name]) - characters for name in names)
    passages: list[Passage] = []
    end = {name: 0 for name in names}
    for i in range(n):
        offset = (2 * i + 1) * total // (2 * n)
        for name in names:
            room = len(documents[name]) - characters
            if offset < room:
                break
            offset -= room
        else:
            break
        text = documents[name]
        line = text.find("\n", max(offset, end[name])) + 1
        start = line if 0 < line <= room else max(offset, end[name])
        if start > room:
            continue
        end[name] = start + characters
        passages.append(Passage(name, text[start : start + characters]))
    if len(passages) < n:
        raise GrokkitError(f"expected text for {n} passages of {characters} characters, found "
                           f"{len(passages)}")  # fmt: skip
    return passages


def write_sample(run: Path, path: Path = FILE) -> None:
    """Write the sample from the held-out documents in a run's folder."""
    from grokkit.zoo.nano.domains import DOMAINS

    held_out = json.loads((run / "held_out.json").read_text(encoding="utf-8"))
    domains = {
        name: {
            "package": DOMAINS[name].package,
            "licence": DOMAINS[name].licence,
            "passages": [dataclasses.asdict(p) for p in take_passages(entry["documents"])],
        }
        for name, entry in held_out.items()
    }
    files.write(path, json.dumps({"domains": domains}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m grokkit.zoo.nano.held_out")
    parser.add_argument("--run", type=Path, default=Path("nano-run"), help="folder of the run")
    write_sample(parser.parse_args().run)
