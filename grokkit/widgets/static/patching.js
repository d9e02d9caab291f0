views.patching = (context) => {
  const summary = make("p", { class: "gk-summary" });
  const grid = make("div", { class: "gk-scroll gk-patch-grid" });
  const readout = make("p", { class: "gk-readout", "aria-live": "polite" });
  const runs = make("div", { class: "gk-columns gk-runs" });
  context.root.append(summary, grid, readout, runs);
  roving(grid, () => context.data.values[0].length);

  const cellOf = (event) => event.target.closest?.("[data-layer]");
  for (const type of ["mouseover", "focusin"]) {
    grid.addEventListener(type, (event) => { const cell = cellOf(event); if (cell) tell(cell); });
  }
  for (const type of ["mouseleave", "focusout"]) grid.addEventListener(type, () => hint());
  grid.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    context.set({ cell: [Number(cell.dataset.layer), Number(cell.dataset.case)] });
  });

  const inPercent = (value) => {
    const rounded = Math.round(100 * share(value));
    return `${rounded < 0 ? "−" : ""}${Math.abs(rounded)}`;
  };
  const signed = (value) => `${Math.round(1000 * value) < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
  const share = (value) => (value - context.data.corrupted) /
    (context.data.clean - context.data.corrupted);

  function caseName(i) {
    const { axis } = context.data;
    return axis === "position" ? `position ${i}` : `${axis} ${i}`;
  }

  function hint() {
    readout.textContent = "Point at a cell for its numbers" +
      (context.live ? "; click it to see that run." : ".");
    delete readout.dataset.value;
  }

  function tell(cell) {
    const { layer, case: i, value } = cell.dataset;
    readout.dataset.value = value;
    readout.textContent = `layer ${layer}, ${caseName(i)}: the metric becomes ` +
      `${signed(Number(value))}; ${inPercent(Number(value))}% of the way from the ` +
      "corrupted to the clean run";
  }

  function drawGrid() {
    const { values, axis, tokens, corrupted } = context.data;
    const largest = Math.max(...values.flat().map((v) => Math.abs(v - corrupted)), 1e-9);
    const heads = values[0].map((_, i) => make("th", { scope: "col" }, axis !== "position" ? String(i)
      : [make("code", {}, named(tokens.clean[i])),
        tokens.clean[i] === tokens.corrupted[i] ? null
          : make("code", { class: "gk-other" }, named(tokens.corrupted[i]))]));
    const rows = values.map((row, layer) => make("tr", {}, make("th", { scope: "row" }, String(layer)),
      row.map((value, i) => {
        const effect = value - corrupted;
        const colour = effect < 0 ? ORANGE : BLUE;
        return make("td", {}, make("button", {
          type: "button", class: "gk-patch-cell", "data-cell": `${layer},${i}`, "data-layer": layer,
          "data-case": i, "data-value": value,
          "aria-label": `layer ${layer}, ${caseName(i)}: ${signed(value)}`,
          style: { background: mix(colour, (0.85 * Math.abs(effect)) / largest) },
        }, inPercent(value) === "0" ? "" : inPercent(value)));
      }))).reverse();
    refill(grid, make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" },
      axis === "position" ? "layer" : `layer, ${axis}`), heads)), make("tbody", {}, rows)));
  }

  function drawRuns() {
    const { runs: known } = context.data;
    const { cell } = context.state;
    const shown = [["clean", "clean run"], ["corrupted", "corrupted run"]];
    if (cell) shown.push([cell.join(","), `layer ${cell[0]}, ${caseName(cell[1])} patched`]);
    runs.replaceChildren(...shown.map(([key, title]) => make("div", { "data-run": key },
      make("h4", {}, title),
      known[key] ? make("p", { "data-metric": known[key].metric }, `metric ${signed(known[key].metric)}`)
        : make("p", { class: "gk-note" },
          context.live ? "running …" : "this run was not opened before the page was saved"),
      known[key] ? tokenBars(known[key].top) : null)));
  }

  return {
    drawData() {
      const { answer, against, clean, corrupted, site, estimate } = context.data;
      summary.replaceChildren("Metric: logit of ", make("code", {}, named(answer)), " less that of ",
        make("code", {}, named(against)), `, ${signed(clean)} in the clean run and ` +
        `${signed(corrupted)} in the corrupted one. ${estimate ? "Estimated" : "Measured"} effect of ` +
        `putting the clean run's ${site} into the corrupted run, in percent of the difference:`);
      drawGrid();
      hint();
    },
    drawState() {
      const chosen = context.state.cell?.join(",");
      for (const cell of grid.querySelectorAll("[data-layer]")) {
        cell.setAttribute("aria-pressed", String(cell.dataset.cell === chosen));
      }
      drawRuns();
    },
  };
};
