views.routing = (context) => {
  const layer = slider("layer", (value) => context.set({ layer: value }));
  const strip = tokenStrip(
    (i) => { looked = i; drawDetail(); },
    (i) => context.set({ token: context.state.token === i ? null : i }),
  );
  const legend = make("div", { class: "gk-legend", role: "group", "aria-label": "experts" });
  const change = make("p", { class: "gk-change" });
  const outcome = make("div", { class: "gk-outcome" });
  const detail = make("div", { class: "gk-detail", "aria-live": "polite" });
  let looked = null;
  context.root.append(layer.node, strip.node, legend, change, outcome, detail);

  const toggled = (list, expert) =>
    list.includes(expert) ? list.filter((e) => e !== expert) : [...list, expert];

  function switchButton(word, names, other, expert) {
    const pressed = context.state[names].includes(expert);
    return make("button", {
      type: "button", class: `gk-${word}`, "data-expert": expert, "aria-pressed": String(pressed),
      "aria-label": `${word} expert ${expert}`,
      onclick: () => context.set({
        [names]: toggled(context.state[names], expert),
        [other]: context.state[other].filter((e) => e !== expert),
      }),
    }, word);
  }

  function drawLegend() {
    const focus = context.root.ownerDocument.activeElement;
    const label = legend.contains(focus) ? focus.getAttribute("aria-label") : null;
    const chips = context.data.colours.map((colour, e) => make("span", { class: "gk-chip" },
      make("span", { class: "gk-swatch", style: { background: mix(colour, 0.65) } }, `expert ${e}`),
      context.live ? switchButton("force", "forced", "forbidden", e) : null,
      context.live ? switchButton("forbid", "forbidden", "forced", e) : null));
    const everywhere = context.live ? make("label", { class: "gk-everywhere" },
      make("input", {
        type: "checkbox", "aria-label": "in every layer",
        checked: context.state.everywhere ? "" : null,
        onchange: (event) => context.set({ everywhere: event.target.checked }),
      }), " in every layer, not only in this one") : null;
    legend.replaceChildren(...chips, ...(everywhere ? [everywhere] : []));
    if (label) legend.querySelector(`[aria-label="${label}"]`)?.focus({ preventScroll: true });
  }

  function drawDetail() {
    const { tokens, probs, experts, colours } = context.data;
    const chosen = looked ?? context.state.token ?? 0;
    const i = Math.min(chosen, tokens.length - 1);
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"),
      colours.map((_, e) => make("th", { scope: "col" }, String(e))));
    const rows = probs.map((layerProbs, l) => make("tr", {
      class: l === context.state.layer ? "gk-current" : "",
    }, make("th", { scope: "row" }, String(l)), layerProbs[i].map((p, e) => {
      const rank = experts[l][i].indexOf(e);
      return make("td", {
        class: rank >= 0 ? "gk-chosen" : "", "data-layer": l, "data-expert": e, "data-p": p,
        "data-rank": rank >= 0 ? rank : null, style: { background: mix(colours[e], 0.7 * p) },
      }, p.toFixed(2));
    })));
    detail.dataset.token = i;
    detail.replaceChildren(
      make("p", {}, "Router's probabilities for token ", make("b", {}, `${i} `),
        make("code", {}, named(tokens[i])), ", and in outline the experts it is sent to"),
      make("div", { class: "gk-scroll" },
        make("table", { class: "gk-probs" }, make("thead", {}, head), make("tbody", {}, rows))));
  }

  function drawOutcome() {
    const found = context.data.outcome;
    change.textContent = context.data.change ? `With ${context.data.change}:` : "";
    if (!found || found.pending) {
      outcome.replaceChildren(found ? "writing both continuations …" : "");
      return;
    }
    const loss = (value) => make("td", { class: "gk-number" }, value === null ? "–" : value.toFixed(3));
    const names = ["without the change", "with the change"];
    outcome.replaceChildren(make("table", { class: "gk-continuations" },
      make("thead", {},
        make("tr", {}, make("th", { rowspan: 2, scope: "col" }, "greedy continuation"),
          make("th", { rowspan: 2, scope: "col" }, "its text"),
          make("th", { colspan: 2, scope: "colgroup" }, "its loss, nats a token")),
        make("tr", {}, names.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, found.texts.map((text, i) => make("tr", { "data-row": i },
        make("th", { scope: "row" }, names[i]), make("td", { class: "gk-text" }, inText(text)),
        found.losses[i].map(loss))))));
  }

  return {
    drawData() {
      looked = null;
      strip.fill(context.data.tokens);
      drawOutcome();
    },
    drawState() {
      const { probs, experts, weights, colours, tokens } = context.data;
      const l = Math.min(context.state.layer, probs.length - 1);
      layer.show(l, probs.length - 1);
      strip.buttons().forEach((button, i) => {
        const [first, second] = experts[l][i];
        button.dataset.experts = experts[l][i].join(" ");
        button.style.background = mix(colours[first], 0.2 + 0.5 * weights[l][i][0]);
        button.style.borderBottomColor = second === undefined ? "transparent" : colours[second];
        button.title = `${named(tokens[i])}: experts ${experts[l][i].join(" and ")}`;
      });
      markPressed(strip.buttons(), context.state.token);
      drawLegend();
      drawDetail();
    },
  };
};
