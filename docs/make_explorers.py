"""Save the pages that docs/widgets.md shows: every explorer with nano on eight virtual devices.

`python docs/make_explorers.py FOLDER` writes them, unless all are newer than the package.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "grokkit"
KINDS = ("routing", "routing-forced", "attention", "lens", "sampling", "patching")
TEXT = "The war ended in the year 1865.\n27+58=85\nfor line in lines:\n    print(line)\n"


def stale(folder: Path) -> bool:
    """Whether a page is missing, or the package has changed since one was saved."""
    pages = [folder / f"{kind}.html" for kind in KINDS]
    sources = (p for p in PACKAGE.rglob("*") if p.suffix in {".py", ".js", ".css"})
    return not all(p.exists() for p in pages) or max(p.stat().st_mtime for p in sources) > min(
        p.stat().st_mtime for p in pages
    )


def save(folder: Path) -> None:
    """Compute and save every page."""
    import grokkit

    grokkit.virtual_devices(8)
    from grokkit import widgets

    lm = grokkit.load("nano", progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    routing = widgets.RoutingExplorer(lm, TEXT, layer=2)
    routing.to_html(folder / "routing.html")
    routing.text = "The duty of the Congress is"
    routing.change(forced=[7])
    routing.to_html(folder / "routing-forced.html")
    text = "Mr. Ellsworth met Mr. Carter. Mr. Ellsworth met Mr. Carter."
    widgets.AttentionExplorer(lm, text, layer=3).to_html(folder / "attention.html")
    lens = widgets.LensExplorer(lm, "27+58=85\n31+45=76", follow="9")
    lens.view.state = {"token": 6, "follow": None}
    lens.to_html(folder / "lens.html")
    sampling = widgets.SamplingPlayground(lm, "The duty of the Congress is", temperature=0.7)
    sampling.view.state = {"token": 0}
    sampling.to_html(folder / "sampling.html")
    patching = widgets.PatchingExplorer(lm, "27+58=", "27+31=", site="experts' output")
    patching.show(4, 6)
    patching.to_html(folder / "patching.html")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if stale(target):
        save(target)
