"""Every explorer as a reader uses it: typing, clicking, dragging, and what the page then shows."""

import re

import numpy as np
import pytest
from driving import drag, explorer, numbers, type_into, words

pytestmark = pytest.mark.browser


def assert_experts_shown(root, chosen, layer):
    """Every token is coloured by the experts it has in this layer."""
    shown = root.locator(".gk-token").evaluate_all("all => all.map(e => e.dataset.experts)")
    assert shown == [" ".join(map(str, pair)) for pair in chosen[layer]]


def test_routing(page, kernel, expect, shoot):
    root = explorer(page, "routing")
    expect(root.locator(".gk-ready")).to_be_visible()
    text = "The sum of 27 and 58 is"
    type_into(root.locator("textarea"), text)
    tokens = kernel.ask(f"lm.to_str_tokens({text!r})")
    expect(root.locator(".gk-token")).to_have_count(len(tokens))
    expect(root.locator(".gk-token").last).to_have_text(tokens[-1])
    assert words(root.locator(".gk-token")) == tokens
    chosen = kernel.ask(
        f'np.asarray(lm.run_with_cache({text!r}, "expert_indices")[1]["expert_indices"])[:, 0]'
        ".tolist()"
    )
    assert_experts_shown(root, chosen, 0)
    before = root.locator(".gk-token").first.evaluate("e => e.style.background")

    drag(page, root.locator(".gk-slider-layer"), 0.02, 0.98)
    last = len(chosen) - 1
    expect(root.locator(".gk-slider-value")).to_have_text(f"{last} of {last}")
    assert_experts_shown(root, chosen, last)
    kernel.wait_for(f"routing.layer == {last}")  # the drag reaches Python
    assert chosen[0][0] != chosen[last][0], "choose a text whose experts differ"
    assert root.locator(".gk-token").first.evaluate("e => e.style.background") != before

    root.locator(".gk-token").nth(4).hover()
    expect(root.locator(".gk-detail")).to_have_attribute("data-token", "4")
    probs = kernel.ask(
        f'np.asarray(lm.run_with_cache({text!r}, "router_probs")[1]["router_probs"])[:, 0, 4]'
        ".tolist()"
    )
    shown = np.reshape(numbers(root.locator(".gk-probs td"), "p"), np.shape(probs))
    np.testing.assert_allclose(shown, probs, atol=1e-5)
    for layer, pair in enumerate(c[4] for c in chosen):
        ranked = root.locator(f'.gk-probs td.gk-chosen[data-layer="{layer}"]')
        by_rank = dict(zip(numbers(ranked, "rank"), numbers(ranked, "expert"), strict=True))
        assert [by_rank[rank] for rank in sorted(by_rank)] == pair
    root.locator(".gk-token").nth(4).focus()
    page.keyboard.press("ArrowRight")
    expect(root.locator(".gk-detail")).to_have_attribute("data-token", "5")
    page.keyboard.press("Enter")
    expect(root.locator(".gk-token").nth(5)).to_have_attribute("aria-pressed", "true")
    shoot(root, "routing")


def test_routing_with_an_expert_forced(page, kernel, expect, shoot):
    root = explorer(page, "routing")
    root.get_by_role("button", name="force expert 5").click()
    expect(root.locator(".gk-continuations tbody tr")).to_have_count(2)
    text = kernel.ask("routing.text")
    chosen = kernel.ask(
        f'np.asarray(lm.run_with_cache({text!r}, "expert_indices", '
        'edits=[grokkit.RequireExperts(5)])[1]["expert_indices"])[:, 0].tolist()'
    )
    assert all(5 in pair for layer in chosen for pair in layer)
    assert_experts_shown(root, chosen, kernel.ask("routing.layer"))
    outcome = kernel.ask('routing.data["outcome"]')
    for i, edits in enumerate(("[]", "[grokkit.RequireExperts(5)]")):
        written = kernel.ask(f"lm.generate({text!r}, max_len=8, temperature=0.0, edits={edits})")
        shown = words(root.locator(f'.gk-continuations tr[data-row="{i}"] td'))
        assert shown[0] == written.replace("\n", "⏎").replace("\t", "⇥")
        assert shown[1:] == [f"{loss:.3f}" for loss in outcome["losses"][i]]
    shoot(root, "routing-forced")
    root.get_by_role("button", name="forbid expert 5").click()  # which releases it
    expect(root.locator(".gk-change")).to_contain_text("expert 5 forbidden in every layer")
    expect(root.locator(".gk-continuations tbody tr")).to_have_count(2)
    experts = root.locator(".gk-token").evaluate_all("all => all.map(e => e.dataset.experts)")
    assert not any("5" in pair.split() for pair in experts)
    root.get_by_role("button", name="forbid expert 5").click()
    expect(root.locator(".gk-change")).to_be_empty()


def test_a_bad_prompt_is_said_in_place(page, expect, shoot):
    root = explorer(page, "routing")
    field = root.locator("textarea")
    field.click()
    field.press("ControlOrMeta+a")
    field.press("Delete")
    field.press("Tab")
    expect(root.locator(".gk-error")).to_have_text("the text is empty; write something")
    expect(root.locator(".grokkit-view")).to_have_css("opacity", "0.4")
    shoot(root, "routing-error")
    type_into(field, "<script>window.broken = 1</script><b>bold")
    expect(root.locator(".gk-ready")).to_be_visible()
    expect(root.locator(".gk-token").first).to_contain_text("<")
    assert "".join(words(root.locator(".gk-token"))).strip() == field.input_value()
    expect(root.locator(".grokkit-view")).to_have_css("opacity", "1")
    assert page.evaluate("window.broken") is None
    assert root.locator(".grokkit-view b", has_text="bold").count() == 0


def test_attention(page, kernel, expect, shoot):
    root = explorer(page, "attention")
    expect(root.locator(".gk-head")).to_have_count(kernel.ask("lm.config.n_heads"))
    drag(page, root.locator(".gk-slider-layer"), 0.02, 0.6)
    layer = int(root.locator(".gk-slider-layer").input_value())
    kernel.wait_for(f'attention.view.state["layer"] == {layer}')
    assert 0 < layer < kernel.ask("lm.config.n_layers") - 1
    root.get_by_role("button", name="head 3", exact=True).click()
    expect(root.locator(".gk-head").nth(3)).to_have_attribute("aria-pressed", "true")
    text = kernel.ask("attention.text")
    pattern = kernel.ask(
        f'np.asarray(lm.run_with_cache({text!r}, "pattern")[1]["pattern"])[{layer}, 0, 3].tolist()'
    )
    for query in (6, 2):
        root.locator(".gk-token").nth(query).hover()
        expect(root.locator(".gk-detail")).to_have_attribute("data-token", str(query))
        shown = numbers(root.locator(".gk-token"), "weight")
        np.testing.assert_allclose(shown, pattern[query], atol=2e-4)
    # The map: the same weight, under the pointer.
    n = len(pattern)
    place = root.locator(".gk-map").bounding_box()
    at = {"x": 1.5 / n * place["width"], "y": 5.5 / n * place["height"]}
    root.locator(".gk-map").hover(position=at)
    expect(root.locator(".gk-readout")).to_contain_text(re.compile(r"token 5 .* → token 1 .*%"))
    percent = root.locator(".gk-readout").text_content().rsplit(" ", 1)[1].strip("<%")
    assert float(percent) / 100 == pytest.approx(pattern[5][1], abs=0.006)
    shoot(root, "attention")


def test_lens(page, kernel, expect, shoot):
    root = explorer(page, "lens")
    type_into(root.locator("textarea"), "27+58=8")
    expect(root.locator("thead th")).to_have_count(
        1 + kernel.ask('len(lm.to_str_tokens("27+58=8"))')
    )
    reading = kernel.ask(
        "[(r.top_tokens[:, 0, :, 0].tolist(), np.exp(r.top_log_probs[:, 0, :, 0]).tolist()) for r in "
        '[__import__("grokkit.analysis.lens", fromlist=["x"])'
        '.logit_lens(lm, "27+58=8", ["embed", "resid_post"])]][0]'
    )
    depth, position = 4, len(reading[0][0]) - 1
    for d, (ids, probs) in enumerate(zip(*reading, strict=True)):
        cells = root.locator(f'.gk-lens-cell[data-depth="{d}"]')
        assert numbers(cells, "id") == ids
        np.testing.assert_allclose(numbers(cells, "p"), probs, atol=1e-3)
    cell = root.locator(f'.gk-lens-cell[data-depth="{depth}"][data-position="{position}"]')
    cell.hover()
    expect(root.locator(".gk-detail")).to_have_attribute("data-depth", str(depth))
    best = root.locator(".gk-detail tr").first
    assert best.get_attribute("data-id") == cell.get_attribute("data-id")
    cell.click()
    expect(root.locator('.gk-line[data-line="2"]')).to_have_attribute(
        "data-id", cell.get_attribute("data-id")
    )
    four = kernel.ask('lm.tokenizer.encode("4")[-1]')
    type_into(root.locator(".gk-input-follow input"), "4")
    expect(root.locator('.gk-line[data-line="2"]')).to_have_attribute("data-id", str(four))
    shoot(root, "lens")


def test_sampling(page, kernel, expect, shoot):
    root = explorer(page, "sampling")
    expect(root.locator(".gk-token")).to_have_count(16)
    page.evaluate(  # from now on, note how many tokens there were at each change
        """() => {
            const strip = document.querySelector(".grokkit-explorer.grokkit-sampling .gk-strip");
            window.counts = [];
            new MutationObserver(() => window.counts.push(strip.querySelectorAll(".gk-token").length))
                .observe(strip, { childList: true });
        }"""
    )
    type_into(root.locator("textarea"), "The war of")
    expect(root.locator(".gk-prompt")).to_have_text("The war of")
    expect(root.locator(".gk-note").first).to_contain_text(re.compile("new tokens;"))
    counts = page.evaluate("window.counts")
    assert len({c for c in counts if 0 < c < 16}) > 2, f"tokens came all at once: {counts}"
    first = numbers(root.locator(".gk-token"), "id")
    assert first == kernel.ask(
        '[t.id for t in lm.stream("The war of", max_len=16, temperature=0.8)]'
    )

    handle = root.locator(".gk-input-temperature .noUi-handle")
    drag(page, handle, 0.5, 6.5)
    expect(root.locator(".gk-input-temperature .widget-readout")).not_to_have_text("0.80")
    expect(root.locator(".gk-ready")).to_be_visible()
    page.wait_for_function(
        f"""() => [...document.querySelectorAll(".grokkit-sampling .gk-token")]
            .map(e => Number(e.dataset.id)).join() !== "{",".join(str(int(i)) for i in first)}" """
    )
    expect(root.locator(".gk-note").first).to_contain_text(re.compile("new tokens;"))
    temperature = kernel.ask("sampling._temperature.value")
    assert temperature > 0.85
    drawn = numbers(root.locator(".gk-token"), "id")
    assert drawn == kernel.ask(
        f'[t.id for t in lm.stream("The war of", max_len=16, temperature={temperature})]'
    )

    root.locator(".gk-token").nth(3).click()
    expect(root.locator(".gk-detail")).to_have_attribute("data-token", "3")
    alternatives = kernel.ask("sampling.alternatives(3)")
    np.testing.assert_allclose(
        numbers(root.locator(".gk-detail tr"), "p"), [a[2] for a in alternatives], atol=1e-6
    )
    button = root.locator(".gk-branch").nth(1)
    other = float(button.get_attribute("data-id"))
    button.click()
    expect(root.locator(".gk-token").nth(3)).to_have_attribute("data-id", str(int(other)))
    expect(root.locator(".gk-note").first).to_contain_text("chosen by hand")
    expect(root.locator(".gk-ready")).to_be_visible()
    branched = numbers(root.locator(".gk-token"), "id")
    assert branched[:4] == [*drawn[:3], other] and drawn[3] != other
    assert kernel.ask("sampling.token_ids") == branched
    shoot(root, "sampling")


def test_patching(page, kernel, expect, shoot):
    root = explorer(page, "patching")
    expect(root.locator(".gk-patch-cell").first).to_be_visible()
    type_into(root.locator(".gk-input-corrupted textarea"), "27+31=")
    expect(root.locator(".gk-other")).to_have_count(2)
    root.locator(".gk-input-site select").select_option("attention output")
    expect(root.locator(".gk-summary")).to_contain_text("attention output")
    sweep = kernel.ask(
        "(lambda p: p.patch(lm, '27+58=', '27+31=', p.LogitDifference("
        "*(int(np.asarray(lm(t).logits[0, -1]).argmax()) for t in ('27+58=', '27+31='))), "
        'p.Positions("attn_out"), progress=False).values.tolist())'
        '(__import__("grokkit.analysis.patching", fromlist=["x"]))'
    )
    for layer, row in enumerate(sweep):
        shown = numbers(root.locator(f'.gk-patch-cell[data-layer="{layer}"]'), "value")
        np.testing.assert_allclose(shown, row, atol=1e-3)
    layer, case = np.unravel_index(np.argmax(sweep), np.shape(sweep))
    cell = root.locator(f'.gk-patch-cell[data-layer="{layer}"][data-case="{case}"]')
    cell.hover()
    expect(root.locator(".gk-readout")).to_contain_text(f"layer {layer}, position {case}")
    cell.click()
    run = root.locator(f'[data-run="{layer},{case}"]')
    expect(run.locator("tr")).to_have_count(8)
    metric = float(run.locator("[data-metric]").get_attribute("data-metric"))
    assert metric == pytest.approx(sweep[layer][case], abs=1e-3)
    assert metric > float(root.locator('[data-run="corrupted"] p').get_attribute("data-metric"))
    shoot(root, "patching")


def test_the_page_stays_alive_while_computing(page, kernel, expect):
    """While one explorer computes, others answer, and it says that it is busy."""
    busy = explorer(page, "patching")
    busy.locator(".gk-input-site select").select_option("attention heads")
    expect(busy.locator(".gk-busy")).to_be_visible()
    other = explorer(page, "attention")
    other.get_by_role("button", name="head 1", exact=True).click()
    expect(other.locator(".gk-head").nth(1)).to_have_attribute("aria-pressed", "true")
    busy.locator(".gk-input-site select").select_option("experts' output")  # supersedes it
    expect(busy.locator(".gk-ready")).to_be_visible()
    expect(busy.locator(".gk-summary")).to_contain_text("experts' output")
    assert kernel.ask('patching.data["site"]') == "experts' output"
