views.attention = (context) => {
  const layer = slider("layer", (value) => context.set({ layer: value }));
  const heads = make("div", { class: "gk-heads", role: "group", "aria-label": "heads" });
  const strip = tokenStrip(
    (i) => { looked = i; drawLook(); },
    (i) => context.set({ token: context.state.token === i ? null : i }),
  );
  const map = make("canvas", { class: "gk-map", role: "img" });
  const above = make("div", { class: "gk-map-above", "aria-hidden": "true" });
  const beside = make("div", { class: "gk-map-beside", "aria-hidden": "true" });
  const readout = make("p", { class: "gk-readout" });
  const detail = make("div", { class: "gk-detail", "aria-live": "polite" });
  let looked = null;
  let unpacked = null; // of the layer shown: every head's entries, row after row
  context.root.append(layer.node, heads, strip.node,
    make("div", { class: "gk-columns" },
      make("div", {}, make("div", { class: "gk-map-frame" }, above, beside, map), readout), detail));
  roving(heads);

  const weight = (head, query, key) =>
    unpacked[head * rowStart(context.data.tokens.length) + rowStart(query) + key] / context.data.steps;
  const rowStart = (query) => (query * (query + 1)) / 2;

  function unpack() {
    const packed = context.data.patterns[context.state.layer];
    if (packed === undefined) return null; // on its way
    const worth = new Uint8Array(128);
    [...context.data.letters].forEach((letter, i) => { worth[letter.charCodeAt(0)] = i; });
    return Uint16Array.from({ length: packed.length / 2 },
      (_, i) => 64 * worth[packed.charCodeAt(2 * i)] + worth[packed.charCodeAt(2 * i + 1)]);
  }

  /** One pixel a pair; the style scales it up without blurring. */
  function paint(canvas, head) {
    const n = context.data.tokens.length;
    canvas.width = n;
    canvas.height = n;
    const image = new ImageData(n, n);
    image.data.fill(255);
    for (let query = 0; query < n; query++) {
      for (let key = 0; key <= query; key++) {
        // The square root shows small weights too.
        const share = Math.sqrt(weight(head, query, key));
        const at = 4 * (query * n + key);
        [0, 114, 178].forEach((value, c) => {
          image.data[at + c] = Math.round(255 + (value - 255) * share);
        });
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /** Token names along the map's edges, as long as they can be read. */
  function drawEdges() {
    const { tokens } = context.data;
    for (const edge of [above, beside]) {
      edge.style.fontSize = `${Math.min(11, 300 / tokens.length)}px`;
      edge.replaceChildren(...(tokens.length > 40 ? []
        : tokens.map((token) => make("span", {}, named(token)))));
    }
  }

  function drawHeads() {
    const buttons = Array.from({ length: context.data.n_heads }, (_, head) => {
      const canvas = make("canvas", { class: "gk-thumbnail" });
      paint(canvas, head);
      return make("button", {
        type: "button", class: "gk-head", "data-cell": head, "aria-label": `head ${head}`,
        "aria-pressed": String(head === context.state.head),
        onclick: () => context.set({ head }),
      }, canvas, make("span", {}, `head ${head}`));
    });
    refill(heads, ...buttons);
  }

  function drawLook() {
    const { tokens } = context.data;
    if (unpacked === null) return;
    const query = Math.min(looked ?? context.state.token ?? tokens.length - 1, tokens.length - 1);
    const row = tokens.map((_, key) => (key <= query ? weight(context.state.head, query, key) : 0));
    strip.buttons().forEach((button, key) => {
      button.style.background = key <= query ? mix(BLUE, 0.7 * Math.sqrt(row[key])) : "";
      button.style.borderBottomColor = key === query ? ORANGE : "transparent";
      button.classList.toggle("gk-later", key > query);
      button.dataset.weight = row[key];
    });
    const best = row.map((p, key) => [key, `${tokens[key]}`, p]).sort((a, b) => b[2] - a[2]);
    detail.dataset.token = query;
    detail.replaceChildren(
      make("p", {}, `Layer ${context.state.layer}, head ${context.state.head}: token `,
        make("b", {}, `${query} `), make("code", {}, named(tokens[query])), " looks at"),
      tokenBars(best.slice(0, Math.min(6, query + 1)),
        ([key]) => make("span", { class: "gk-place" }, `token ${key}`)));
  }

  map.addEventListener("mousemove", (event) => {
    const { tokens } = context.data;
    const box = map.getBoundingClientRect();
    const place = (offset, size) =>
      Math.max(0, Math.min(tokens.length - 1, Math.floor((offset / size) * tokens.length)));
    const query = place(event.clientY - box.top, box.height);
    const key = place(event.clientX - box.left, box.width);
    if (unpacked === null) return;
    readout.textContent = key > query
      ? `token ${query} “${named(tokens[query])}” cannot see token ${key}, which follows it`
      : `token ${query} “${named(tokens[query])}” → token ${key} “${named(tokens[key])}”: ` +
        percent(weight(context.state.head, query, key));
    if (looked !== query) { looked = query; drawLook(); }
  });
  map.addEventListener("mouseleave", () => { looked = null; showHint(); drawLook(); });
  const showHint = () => {
    readout.textContent = "rows: the token that looks; columns: what it looks at; darker is more";
  };
  showHint();

  return {
    drawData() {
      looked = null;
      strip.fill(context.data.tokens);
      drawEdges();
    },
    drawState() {
      layer.show(context.state.layer, context.data.n_layers - 1);
      unpacked = unpack();
      if (unpacked === null) return;
      drawHeads();
      paint(map, context.state.head);
      map.setAttribute("aria-label",
        `attention pattern of layer ${context.state.layer}, head ${context.state.head}`);
      markPressed(strip.buttons(), context.state.token);
      drawLook();
    },
  };
};
