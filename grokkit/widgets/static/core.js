// What all views share. A view is a function of a context (data, state, live, set, send, root) that
// builds its elements once and returns `drawData` and `drawState`, called when either changes.
const views = {};

/** An element; attributes named on… are listeners, children may be text. Text is never markup. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function makeSvg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A token as it stands in a text: line breaks and tabs seen, spaces kept by the style. */
function inText(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/** A token named in a sentence: spaces seen too. */
function named(token) {
  return inText(token).replaceAll(" ", "␣");
}

/** A colour mixed into white, `share` of it from 0 to 1. */
function mix(colour, share) {
  const part = (at) => {
    const value = parseInt(colour.slice(at, at + 2), 16);
    return Math.round(255 + (value - 255) * Math.max(0, Math.min(1, share)));
  };
  return `rgb(${part(1)}, ${part(3)}, ${part(5)})`;
}

const BLUE = "#0072B2";
const ORANGE = "#D55E00";

function percent(p) {
  const digits = p >= 0.995 && p < 0.9995 ? 1 : p >= 0.0995 ? 0 : p >= 0.00995 ? 1 : 2;
  return p < 0.00005 ? "<0.01%" : `${(100 * p).toFixed(digits)}%`;
}

/** A labelled slider over whole numbers; `show(value, last)` sets it without an event. */
function slider(label, changed) {
  const output = make("output", { class: "gk-slider-value" });
  const input = make("input", {
    type: "range", min: 0, step: 1, class: `gk-slider-${label}`,
    oninput: () => { output.textContent = input.value; changed(Number(input.value)); },
  });
  const node = make("label", { class: "gk-slider" }, `${label} `, input, " ", output);
  return {
    node,
    show(value, last) {
      input.max = last;
      input.value = value;
      input.disabled = last === 0;
      output.textContent = `${value} of ${last}`;
    },
  };
}

/** Arrow keys move between the buttons in a group, of which one is reached by Tab. */
function roving(container, columns = () => 1) {
  const items = () => [...container.querySelectorAll("[data-cell]")];
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(document.activeElement);
    const wide = columns();
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide,
      Home: -at, End: all.length - 1 - at,
    };
    if (at < 0 || !(event.key in steps)) return;
    const next = all[at + steps[event.key]];
    if (next) next.focus();
    event.preventDefault();
    event.stopPropagation();
  });
  container.addEventListener("focusin", (event) => {
    if (!event.target.matches("[data-cell]")) return;
    for (const item of items()) item.tabIndex = item === event.target ? 0 : -1;
  });
}

/** Replace a group's content, with the focus on the cell of the same number if it was on one. */
function refill(container, ...children) {
  const focused = container.contains(document.activeElement) ? document.activeElement : null;
  const cell = focused?.dataset.cell;
  container.replaceChildren(...children);
  const items = [...container.querySelectorAll("[data-cell]")];
  const again = cell === undefined ? undefined : items.find((item) => item.dataset.cell === cell);
  for (const item of items) item.tabIndex = -1;
  const first = again ?? items[0];
  if (first) first.tabIndex = 0;
  if (again) again.focus({ preventScroll: true });
}

/** A row of tokens as buttons; `look(i)` while one is pointed at or focused, `look(null)` after. */
function tokenStrip(look, click) {
  const node = make("div", { class: "gk-strip", role: "group", "aria-label": "tokens" });
  roving(node);
  const at = (event) => {
    const token = event.target.closest?.("[data-cell]");
    return token ? Number(token.dataset.cell) : null;
  };
  for (const type of ["mouseover", "focusin"]) {
    node.addEventListener(type, (event) => { if (at(event) !== null) look(at(event)); });
  }
  for (const type of ["mouseleave", "focusout"]) node.addEventListener(type, () => look(null));
  node.addEventListener("click", (event) => { if (at(event) !== null) click(at(event)); });
  return {
    node,
    buttons: () => [...node.querySelectorAll("[data-cell]")],
    fill(tokens, before = []) {
      const children = tokens.flatMap((token, i) => {
        const label = `token ${i}: ${named(token)}`;
        const button = make("button", {
          type: "button", class: "gk-token", "data-cell": i, "aria-label": label,
        }, inText(token));
        return token.includes("\n") ? [button, make("br")] : [button];
      });
      refill(node, ...before, ...children);
    },
  };
}

/** Mark the chosen token and tell assistive software. */
function markPressed(buttons, chosen) {
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
}

/** Bars of tokens and their probabilities: [id, text, probability]; `extra` adds to a row. */
function tokenBars(entries, extra = () => null) {
  const largest = Math.max(...entries.map((entry) => entry[2]), 1e-9);
  return make("table", { class: "gk-bars" }, make("tbody", {}, entries.map((entry) => {
    const [id, text, p] = entry;
    const bar = make("div", {
      class: "gk-bar", style: { width: `${(100 * p) / largest}%`, background: mix(BLUE, 0.75) },
    });
    return make("tr", { "data-id": id, "data-p": p },
      make("th", { scope: "row" }, named(text)),
      make("td", { class: "gk-bar-cell" }, bar),
      make("td", { class: "gk-number" }, percent(p)),
      make("td", {}, extra(entry)));
  })));
}

function start(context, kind) {
  context.root.classList.add("grokkit-view");
  // A notebook's one-letter shortcuts must not act on what is typed here.
  context.root.dataset.lmSuppressShortcuts = "true";
  const view = views[kind](context);
  const ready = () => Object.keys(context.data).length > 0;
  const drawState = () => { if (ready()) view.drawState(); };
  const drawData = () => { if (ready()) { view.drawData(); view.drawState(); } };
  drawData();
  return { drawData, drawState };
}

/** The notebook's component: data and state come from Python, and state goes back. */
function render({ model, el }) {
  const root = make("div");
  el.append(root);
  const context = {
    root,
    live: true,
    get data() { return model.get("data"); },
    get state() { return model.get("state"); },
    set(changes) { model.set("state", { ...model.get("state"), ...changes }); model.save_changes(); },
    send(message) { model.send(message); },
  };
  const { drawData, drawState } = start(context, model.get("kind"));
  const drawStatus = () => { root.dataset.status = model.get("status"); };
  drawStatus();
  const listeners = { "change:data": drawData, "change:state": drawState, "change:status": drawStatus };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

/** An exported page: the same view on what was saved. */
function mountPage() {
  const saved = JSON.parse(document.getElementById("grokkit-data").textContent);
  let drawn = null;
  const context = {
    root: document.getElementById("grokkit-root"),
    live: false,
    data: saved.data,
    state: saved.state,
    set(changes) { context.state = { ...context.state, ...changes }; drawn?.drawState(); },
    send() {},
  };
  drawn = start(context, saved.kind);
}
