views.lens = (context) => {
  const grid = make("div", { class: "gk-scroll gk-lens-grid" });
  const chart = make("div", { class: "gk-chart" });
  const detail = make("div", { class: "gk-detail", "aria-live": "polite" });
  let looked = null; // [depth, position]
  context.root.append(grid, make("div", { class: "gk-columns" }, chart, detail));
  roving(grid, () => context.data.tokens.length);

  const cellOf = (event) => event.target.closest?.("[data-depth]");
  const where = (cell) => [Number(cell.dataset.depth), Number(cell.dataset.position)];
  for (const type of ["mouseover", "focusin"]) {
    grid.addEventListener(type, (event) => {
      const cell = cellOf(event);
      if (cell) { looked = where(cell); drawDetail(); }
    });
  }
  for (const type of ["mouseleave", "focusout"]) {
    grid.addEventListener(type, () => { looked = null; drawDetail(); });
  }
  grid.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    const [depth, position] = where(cell);
    context.set({ token: position, follow: context.data.top[depth][position][0] });
  });

  const chosenPosition = () =>
    Math.min(context.state.token ?? context.data.tokens.length - 1, context.data.tokens.length - 1);

  function drawGrid() {
    const { tokens, depths, top, probs, names } = context.data;
    const head = make("tr", {}, make("th", { scope: "col" }, "after"),
      tokens.map((token, i) => make("th", { scope: "col", title: `token ${i}` },
        make("code", {}, named(token)))));
    // The last depth on top, as the stream rises through the layers.
    const rows = depths.map((name, d) => make("tr", {}, make("th", { scope: "row" }, name),
      tokens.map((_, i) => make("td", {}, make("button", {
        type: "button", class: "gk-lens-cell", "data-cell": `${d},${i}`, "data-depth": d,
        "data-position": i, "data-id": top[d][i][0], "data-p": probs[d][i][0],
        "aria-label": `${name}, token ${i}: ${named(names[top[d][i][0]])} ${percent(probs[d][i][0])}`,
        style: { background: mix(BLUE, 0.7 * probs[d][i][0]) },
      }, named(names[top[d][i][0]])))))).reverse();
    refill(grid, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)));
  }

  function drawDetail() {
    const { tokens, depths, top, probs, kl, names } = context.data;
    const [d, i] = looked ?? [depths.length - 1, chosenPosition()];
    if (d >= depths.length || i >= tokens.length) return;
    detail.dataset.depth = d;
    detail.dataset.position = i;
    detail.replaceChildren(
      make("p", {}, `After ${depths[d]}, behind token `, make("b", {}, `${i} `),
        make("code", {}, named(tokens[i])), ", the lens reads"),
      tokenBars(top[d][i].map((id, rank) => [id, names[id], probs[d][i][rank]])),
      make("p", { class: "gk-note" },
        `${Math.max(0, kl[d][i]).toFixed(2)} nats from what the model says in the end`));
  }

  function drawChart() {
    const { tokens, depths, lines, line_probs, names, follow } = context.data;
    const i = chosenPosition();
    const width = 460, height = 230, left = 62, right = 12, top = 14, bottom = 34;
    const floor = 1e-5;
    const x = (d) => left + (d * (width - left - right)) / Math.max(1, depths.length - 1);
    const y = (p) =>
      top + (Math.log10(Math.max(p, floor)) / Math.log10(floor)) * (height - top - bottom);
    const svg = makeSvg("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", class: "gk-lines",
      "aria-label": `probability by depth at token ${i}`,
    });
    for (let power = 0; power >= -5; power--) {
      const at = y(10 ** power);
      svg.append(makeSvg("line", { x1: left, x2: width - right, y1: at, y2: at, class: "gk-rule" }),
        makeSvg("text", { x: left - 6, y: at + 4, class: "gk-tick gk-tick-y" },
          power === -5 ? "≤0.001%" : `${+(100 * 10 ** power).toPrecision(1)}%`));
    }
    const step = Math.ceil(depths.length / 12);
    depths.forEach((name, d) => {
      if (d % step === 0) {
        svg.append(makeSvg("text", { x: x(d), y: height - bottom + 16, class: "gk-tick gk-tick-x" },
          name.replace("layer ", "")));
      }
    });
    svg.append(makeSvg("text", { x: (left + width) / 2, y: height - 3, class: "gk-tick gk-tick-x" },
      "after layer"));
    const kinds = [
      ["the text goes on with", "#0072B2", "", i < tokens.length - 1],
      ["read in the end:", "#D55E00", "6 3", true],
      ["followed:", "#009E73", "2 3", follow !== null],
    ];
    const legend = kinds.flatMap(([what, colour, dash, present], k) => {
      if (!present) return [];
      const id = lines[i][k];
      const points = depths.map((_, d) => [x(d), y(line_probs[d][i][k])]);
      svg.append(makeSvg("polyline", {
        points: points.map((point) => point.join(",")).join(" "), fill: "none", stroke: colour,
        "stroke-width": 2, "stroke-dasharray": dash, class: "gk-line", "data-id": id, "data-line": k,
      }), ...points.map(([cx, cy]) => makeSvg("circle", { cx, cy, r: 2.5, fill: colour })));
      return [make("li", { "data-line": k },
        make("span", { class: "gk-key", style: { background: colour } }), ` ${what} `,
        make("code", {}, named(names[id])), ", ",
        make("b", {}, percent(line_probs[depths.length - 1][i][k])), " at the last depth")];
    });
    chart.dataset.position = i;
    chart.replaceChildren(
      make("p", {}, "How probable the token after ", make("b", {}, `${i} `),
        make("code", {}, named(tokens[i])), " becomes"),
      svg, make("ul", { class: "gk-keys" }, legend));
  }

  return {
    drawData() {
      looked = null;
      drawGrid();
    },
    drawState() {
      const i = chosenPosition();
      for (const cell of grid.querySelectorAll("[data-depth]")) {
        const isFollowed = Number(cell.dataset.id) === context.data.follow;
        cell.classList.toggle("gk-followed", isFollowed);
        cell.classList.toggle("gk-column", Number(cell.dataset.position) === i);
      }
      drawDetail();
      drawChart();
    },
  };
};
