"""Exported pages work from disk, offline, and every notebook opens without an error."""

import json
from pathlib import Path

import numpy as np
import pytest
from driving import Watched, drag, numbers, words

pytestmark = pytest.mark.browser
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(kernel, tmp_path_factory):
    """Saves an explorer of the notebook, and what its page ought to show."""
    folder = tmp_path_factory.mktemp("exports")

    def save(name):
        path = kernel.ask(f"str({name}.to_html({str(folder / name)!r} + '.html'))")
        return Path(path), kernel.ask(f"{name}._whole_data()")

    return save


@pytest.fixture
def opened(chromium, exported):
    """Opens a saved page offline; afterwards no error and no request but for the file may be."""
    context = chromium.new_context(viewport={"width": 1100, "height": 900}, offline=True)
    watched = Watched(context)

    def open_page(name):
        path, data = exported(name)
        watched.page.goto(path.as_uri())
        return watched.page, data

    yield open_page
    watched.check()
    assert [url.partition(":")[0] for url in watched.requests] == ["file"]
    context.close()


def test_routing(opened, expect, shoot):
    page, data = opened("routing")
    assert words(page.locator(".gk-token")) == [
        t.replace("\n", "⏎").replace("\t", "⇥") for t in data["tokens"]
    ]
    assert page.evaluate("window.broken") is None  # the text was one with a script in it
    assert "<script>" in "".join(data["tokens"])
    drag(page, page.locator(".gk-slider-layer"), 0.98, 0.02)
    shown = page.locator(".gk-token").evaluate_all("all => all.map(e => e.dataset.experts)")
    assert shown == [" ".join(map(str, pair)) for pair in data["experts"][0]]
    page.locator(".gk-token").nth(2).hover()
    expect(page.locator(".gk-detail")).to_have_attribute("data-token", "2")
    shown = np.reshape(numbers(page.locator(".gk-probs td"), "p"), np.shape(data["probs"])[::2])
    np.testing.assert_allclose(shown, np.array(data["probs"])[:, 2])
    assert page.get_by_role("button", name="force expert").count() == 0  # it has no kernel
    shoot(page, "page-routing")


def test_attention(opened, expect, shoot):
    page, data = opened("attention")
    page.get_by_role("button", name="head 2", exact=True).click()
    weights = []
    for layer in (0.02, 0.98):  # every layer is there, without a kernel
        drag(page, page.locator(".gk-slider-layer"), 1 - layer, layer)
        page.locator(".gk-token").nth(5).hover()
        expect(page.locator(".gk-detail")).to_have_attribute("data-token", "5")
        weights.append(numbers(page.locator(".gk-token"), "weight"))
    n, steps, letters = len(data["tokens"]), data["steps"], data["letters"]
    size = n * (n + 1) // 2
    for shown, layer in zip(weights, (0, data["n_layers"] - 1), strict=True):
        digits = [letters.index(letter) for letter in data["patterns"][str(layer)]]
        entries = (np.array(digits).reshape(-1, 2) @ [64, 1])[2 * size :][:size]
        np.testing.assert_allclose(shown[:6], entries[15:21] / steps, atol=1e-9)
        assert sum(shown) == pytest.approx(1, abs=0.01)
    shoot(page, "page-attention")


def test_lens(opened, expect, shoot):
    page, data = opened("lens")
    cell = page.locator('.gk-lens-cell[data-depth="3"][data-position="1"]')
    cell.hover()
    expect(page.locator(".gk-detail")).to_have_attribute("data-depth", "3")
    assert numbers(page.locator(".gk-detail tr"), "id") == data["top"][3][1]
    cell.click()
    expect(page.locator(".gk-chart")).to_have_attribute("data-position", "1")
    shown = page.locator('.gk-line[data-line="0"]').get_attribute("data-id")
    assert int(shown) == data["lines"][1][0]
    shoot(page, "page-lens")


def test_sampling(opened, expect, shoot):
    page, data = opened("sampling")
    assert numbers(page.locator(".gk-token"), "id") == [entry["id"] for entry in data["drawn"]]
    page.locator(".gk-token").nth(1).hover()
    expect(page.locator(".gk-detail")).to_have_attribute("data-token", "1")
    alternatives = data["drawn"][1]["alternatives"]
    assert numbers(page.locator(".gk-detail tr"), "id") == [a[0] for a in alternatives]
    assert page.locator(".gk-branch").count() == 0
    shoot(page, "page-sampling")


def test_patching(opened, expect, shoot):
    page, data = opened("patching")
    cell = page.locator('.gk-patch-cell[data-layer="2"][data-case="1"]')
    cell.hover()
    expect(page.locator(".gk-readout")).to_have_attribute("data-value", str(data["values"][2][1]))
    cell.click()
    expect(page.locator('[data-run="2,1"]')).to_contain_text("was not opened before")
    shoot(page, "page-patching")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_opens_without_an_error(lab, chromium, path, shoot):
    context = chromium.new_context(viewport={"width": 1300, "height": 1000})
    watched = Watched(context)
    watched.page.goto(lab.page_of(path.name))
    watched.page.wait_for_selector(".jp-Notebook .jp-OutputArea-output")
    watched.page.wait_for_function(
        """() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel
            ?.connectionStatus === "connected" """
    )
    stored = [output for cell in json.loads(path.read_text())["cells"]
              for output in cell.get("outputs", ())]  # fmt: skip
    pictures = sum("image/png" in output.get("data", {}) for output in stored)
    assert pictures > 1
    watched.page.wait_for_function(
        """n => [...document.querySelectorAll(".jp-OutputArea-output img")]
            .filter(image => image.naturalWidth > 0).length === n""",
        arg=pictures,
    )
    assert (
        watched.page.locator('[data-mime-type$="stderr"], [data-mime-type$=".error"]').count() == 0
    )
    # A notebook from elsewhere is not trusted, and its outputs' scripts do not run.
    blank = """all => all.filter(e => !e.innerText.trim() && !e.querySelector("img"))
        .map(e => e.outerHTML.slice(0, 300))"""
    assert watched.page.locator(".jp-OutputArea-output").evaluate_all(blank) == []
    shoot(watched.page, f"notebook-{path.stem}")
    watched.check()
    context.close()
