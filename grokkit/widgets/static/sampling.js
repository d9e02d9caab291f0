views.sampling = (context) => {
  const strip = tokenStrip(
    (i) => { looked = i; drawDetail(); },
    (i) => context.set({ token: context.state.token === i ? null : i }),
  );
  const note = make("p", { class: "gk-note" });
  const detail = make("div", { class: "gk-detail", "aria-live": "polite" });
  let looked = null;
  let shown = null; // what the detail was drawn for
  context.root.append(strip.node, note, detail);

  function drawDetail() {
    const { drawn } = context.data;
    const i = looked ?? context.state.token;
    // A press on a button below takes the focus from a token: the button must outlive that.
    const now = `${i} ${context.state.token}`;
    if (now === shown) return;
    shown = now;
    if (i === null || i === undefined || i >= drawn.length) {
      detail.replaceChildren(make("p", { class: "gk-note" },
        drawn.length ? "Point at a new token to see what else the model found probable." : ""));
      delete detail.dataset.token;
      return;
    }
    const entry = drawn[i];
    detail.dataset.token = i;
    detail.replaceChildren(
      make("p", {}, entry.by_hand ? "Chosen by hand" : "Drawn", ": new token ",
        make("b", {}, `${i} `), make("code", {}, named(entry.text)),
        `, with probability ${percent(entry.prob)}. The most probable in its place:`),
      tokenBars(entry.alternatives, ([id, text]) => {
        if (id === entry.id) return make("span", { class: "gk-place" }, "this one");
        if (!context.live || context.state.token !== i) return null;
        return make("button", {
          type: "button", class: "gk-branch", "data-id": id,
          "aria-label": `continue with ${named(text)}`, onclick: () => context.send({ at: i, id }),
        }, "continue with it");
      }));
    if (context.live && context.state.token !== i) {
      detail.append(make("p", { class: "gk-note" }, "Click the token to continue from another."));
    }
  }

  return {
    drawData() {
      const { prompt, drawn, ended, done } = context.data;
      looked = null;
      shown = null;
      strip.fill(drawn.map((entry) => entry.text),
        [make("span", { class: "gk-prompt" }, prompt)]);
      strip.buttons().forEach((button, i) => {
        button.style.background = mix(BLUE, 0.06 + 0.6 * drawn[i].prob);
        button.style.borderBottomColor = drawn[i].by_hand ? ORANGE : "transparent";
        button.dataset.id = drawn[i].id;
      });
      note.textContent = ended ? `Ended by the model after ${drawn.length} tokens.`
        : `${drawn.length} new tokens${done ? "" : " so far"}; darker ones were more probable` +
          (drawn.some((entry) => entry.by_hand) ? ", underlined ones were chosen by hand." : ".");
    },
    drawState() {
      markPressed(strip.buttons(), context.state.token);
      drawDetail();
    },
  };
};
