// Curves over steps, drawn by the plotting library in assets/, which is loaded for the first of them. What a chart
// looks like is data of the page (`figures/step_chart.py`) and its style sheet.
"use strict";

const charts = (() => {
  const loads = {}, traces = {}; // a script of assets/traces/ leaves its record in `traces`

  // A script of assets/, once. Rejects where it is missing.
  function load(name) {
    loads[name] ||= new Promise((resolve, reject) => {
      const src = document.body.dataset.assets + name;
      const onerror = () => reject(new Error(`No curves: ${src} is missing; writing the report again brings it back.`));
      document.head.append(Object.assign(document.createElement("script"), { src, onload: resolve, onerror }));
    });
    return loads[name];
  }

  // The curves of a record: name -> { x, y }.
  function decode({ steps, curves }) {
    const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
    const x = steps.map(floats);
    return Object.fromEntries(Object.entries(curves).map(([name, [at, y]]) => [name, { x: x[at], y: floats(y) }]));
  }

  const trace = (id) => load(`traces/${id}.js`).then(() => decode(traces[id]));

  // What a curve reads at a step: its value, or the last one before with its step; nothing before its first.
  function read({ x, y }, step) {
    const i = x.findLastIndex((s) => s <= step);
    const value = Number.isFinite(y[i]) ? String(+y[i].toPrecision(4)) : "not finite";
    return i < 0 ? "" : value + (x[i] < step ? ` at ${x[i]}` : "");
  }

  // Shows so many times as many steps, around the cursor.
  function zoom(place, factor) {
    const [low, high] = place.layout.xaxis.range, at = place.step ?? (low + high) / 2;
    Plotly.relayout(place, { "xaxis.range": [at - (at - low) * factor, at + (high - at) * factor] });
  }

  // Moves the cursor by a step, of many by more, as the pointer would.
  function move(place, by) {
    const [low, high] = place.layout.xaxis.range, layer = place.querySelector(".nsewdrag");
    const { left, top, width, height } = layer.getBoundingClientRect();
    const step = (place.step ?? (low + high) / 2) + by * Math.max(1, (high - low) / 200);
    const clientX = left + width * (Math.max(low, Math.min(high, step)) - low) / (high - low);
    layer.dispatchEvent(new MouseEvent("mousemove", { clientX, clientY: top + height / 2, bubbles: true }));
  }

  const KEYS = {
    ArrowLeft: (place) => move(place, -1), ArrowRight: (place) => move(place, 1),
    "+": (place) => zoom(place, 0.5), "-": (place) => zoom(place, 2),
    Home: (place) => Plotly.relayout(place, { "xaxis.autorange": true }),
  };

  // Draws panels, whose axes are y, y2, ..., one above the other. Then calls the place's own cursor(step or null),
  // clicked(step) and zoomed([first, last], or null for every step).
  async function draw(place, panels, data, form) {
    await load("plotly.js");
    const isNew = !place.data, layout = structuredClone(form); // the library writes into it
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
    layout.grid.rows = panels;
    layout.height = 60 + 200 * panels;
    await Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
    if (!isNew) return;
    place.on("plotly_hover", ({ points: [{ x }] }) => place.cursor(place.step = x));
    place.on("plotly_unhover", () => place.cursor(place.step = null));
    place.on("plotly_click", ({ points: [{ x }] }) => place.clicked?.(x));
    place.on("plotly_relayout", () => place.zoomed(place.layout.xaxis.autorange ? null : place.layout.xaxis.range));
    place.onkeydown = (event) => {
      if (!KEYS[event.key]) return;
      event.preventDefault();
      KEYS[event.key](place);
    };
  }

  return { decode, draw, load, read, trace, traces, zoom };
})();
