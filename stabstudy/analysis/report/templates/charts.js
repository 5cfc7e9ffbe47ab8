// Line charts over steps, drawn by the plotting library in assets/, which is loaded for the first of them.
"use strict";

const charts = (() => {
  const COLOURS = ["#0072b2", "#d55e00", "#008f68", "#b5548f", "#a07000", "#7a5af0", "#5f7f00", "#c8394b"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const loads = {}, traces = {}; // a script of assets/traces/ leaves its curves in `traces`

  // A script of assets/, once. Rejects where it is missing.
  function load(name) {
    loads[name] ||= new Promise((resolve, reject) => {
      const src = document.body.dataset.assets + name;
      const onerror = () => reject(new Error(`No curves: ${src} is missing; writing the report again brings it back.`));
      document.head.append(Object.assign(document.createElement("script"), { src, onload: resolve, onerror }));
    });
    return loads[name];
  }

  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

  // The curves of a trial: name -> { x, y }.
  async function trace(id) {
    await load(`traces/${id}.js`);
    const steps = traces[id].steps.map(floats);
    const curves = Object.entries(traces[id].curves);
    return Object.fromEntries(curves.map(([name, [at, values]]) => [name, { x: steps[at], y: floats(values) }]));
  }

  const style = (i) => ({ color: COLOURS[i % 8], dash: DASHES[Math.floor(i / 8) % 4] });

  const brief = (v) => (Number.isFinite(v) ? String(+v.toPrecision(4)) : "not finite");

  // The largest of 1, 2, 5, 10, 20 ... that is not above a size.
  function nice(size) {
    const power = 10 ** Math.floor(Math.log10(size));
    return power * [5, 2, 1].find((m) => m * power <= size);
  }

  // At least three round numbers between two.
  function ticks(low, high, log) {
    const first = Math.floor(Math.log10(low)), every = Math.ceil(Math.log10(high / low) / 8);
    for (const digits of log ? [[1], [1, 3], [1, 2, 5]] : []) {
      const decades = Array.from({ length: Math.log10(high) - first + 1 }, (_, i) => 10 ** (first + i * every));
      const round = decades.flatMap((d) => digits.map((m) => m * d)).filter((v) => v >= low && v <= high);
      if (round.length > 2) return round;
    }
    const by = nice((high - low) / 3.5), start = Math.ceil(low / by);
    return Array.from({ length: Math.floor(high / by) - start + 1 }, (_, i) => (start + i) * by);
  }

  // Round numbers on a log scale of these curves, without powers.
  function decades(curves) {
    const seen = curves.flatMap(({ y }) => [...y].filter((v) => v > 0 && v < Infinity));
    const at = (best) => seen.reduce((a, b) => best(a, b));
    const tickvals = seen.length ? ticks(at(Math.min), at(Math.max) * 1.001, true) : [1];
    return { tickvals, ticktext: tickvals.map((v) => (v < 0.01 ? v.toExponential() : brief(v))) };
  }

  function layout(panels, { range, axis: own, margin }) {
    const css = getComputedStyle(document.body);
    const [ink, line, muted] = ["--ink", "--line", "--muted"].map((name) => css.getPropertyValue(name));
    // no powers: they would be inline styles
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, exponentformat: "e" };
    const cursor = { showspikes: true, spikecolor: muted, spikemode: "across", spikesnap: "hovered data",
      spikethickness: 1, spikedash: "solid" };
    const upward = panels.map(({ label, log, traces: curves, axis: fitted = log && decades(curves) }, i) => (
      [`yaxis${i + 1}`, { ...axis, title: { text: label }, type: log ? "log" : "linear", fixedrange: true, ...fitted }]));
    return {
      height: panels.reduce((sum, { height = 200 }) => sum + height, 60), margin: { t: 12, r: 12, l: 70, b: 44, ...margin },
      font: { family: css.fontFamily, size: 13, color: ink }, paper_bgcolor: "#0000", plot_bgcolor: "#0000",
      grid: { rows: panels.length, columns: 1, pattern: "coupled", ygap: 0.12 }, showlegend: false,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hovermode: "x", hoversubplots: "axis", hoverdistance: -1, spikedistance: -1,
      xaxis: { ...axis, ...cursor, title: { text: "optimizer step" }, range, autorange: !range, ...own },
      ...Object.fromEntries(upward),
      shapes: panels.flatMap((panel) => panel.shapes || []), annotations: panels.flatMap((p) => p.annotations || []),
    };
  }

  // Moves the cursor to a step, as the pointer would.
  function point(place, step) {
    const [low, high] = place.layout.xaxis.range, layer = place.querySelector(".nsewdrag");
    const { left, top, width, height } = layer.getBoundingClientRect();
    const clientX = left + width * (Math.max(low, Math.min(high, step)) - low) / (high - low);
    layer.dispatchEvent(new MouseEvent("mousemove", { clientX, clientY: top + height / 2, bubbles: true }));
  }

  function press(event, place) {
    const [low, high] = place.layout.xaxis.range, at = place.step ?? (low + high) / 2;
    const by = Math.max(1, (high - low) / 200), wide = { "+": 0.5, "-": 2 }[event.key];
    if (event.key === "ArrowRight") point(place, at + by);
    else if (event.key === "ArrowLeft") point(place, at - by);
    else if (event.key === "Home") Plotly.relayout(place, { "xaxis.autorange": true });
    else if (wide) Plotly.relayout(place, { "xaxis.range": [at - (at - low) * wide, at + (high - at) * wide] });
    else return;
    event.preventDefault();
  }

  // Panels over one axis of steps: [{ label, log, height, traces, shapes, annotations }], traces as Plotly's.
  // options: range [first, last], changed(range or null), cursor(step or null, the points at it).
  async function draw(place, panels, options = {}) {
    await load("plotly.js");
    const lines = panels.flatMap((panel, i) => panel.traces.map((one) => (
      { mode: "lines", hoverinfo: "none", ...one, xaxis: "x", yaxis: `y${i + 1}` })));
    await Plotly.react(place, lines, layout(panels, options), { displayModeBar: false, responsive: true });
    Object.assign(place, { tabIndex: 0, onkeydown: (event) => press(event, place) });
    for (const name of ["plotly_hover", "plotly_unhover", "plotly_relayout"]) place.removeAllListeners(name);
    place.on("plotly_hover", ({ points }) => options.cursor?.(place.step = points[0].x, points));
    place.on("plotly_unhover", () => options.cursor?.(null, []));
    place.on("plotly_relayout", () => {
      options.range = place.layout.xaxis.autorange ? undefined : place.layout.xaxis.range;
      options.changed?.(options.range || null);
    });
    place.redraw = () => draw(place, panels, options);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of document.querySelectorAll(".js-plotly-plot")) place.redraw();
  });

  return { brief, draw, floats, load, nice, point, style, ticks, trace, traces };
})();
