// Line charts over steps, drawn by the plotting library in assets/: it is loaded when the first chart is drawn.
"use strict";

const charts = (() => {
  const COLOURS = ["#0072b2", "#d55e00", "#008f68", "#b5548f", "#a07000", "#7a5af0", "#5f7f00", "#c8394b"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const loads = {};

  // A script of assets/, once. Rejects where it is missing.
  function load(name) {
    loads[name] ||= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = document.body.dataset.assets + name;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${script.src} is missing: write the report again`));
      document.head.append(script);
    });
    return loads[name];
  }

  function floats(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  const style = (i) => ({ color: COLOURS[i % COLOURS.length], dash: DASHES[Math.floor(i / COLOURS.length) % 4] });

  function layout(panels, range) {
    const css = getComputedStyle(document.body);
    const [ink, line, muted] = ["--ink", "--line", "--muted"].map((name) => css.getPropertyValue(name));
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, exponentformat: "power" };
    const made = {
      height: 70 + panels.reduce((sum, panel) => sum + (panel.height || 200), 0), margin: { t: 12, r: 12, l: 70, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: "zoom",
      font: { family: css.fontFamily, size: 13, color: ink }, hovermode: "x", hoversubplots: "axis", uirevision: "kept",
      grid: { rows: panels.length, columns: 1, pattern: "coupled", ygap: 0.12 },
      xaxis: { ...axis, title: { text: "optimizer step" }, range, autorange: !range, showspikes: true, spikecolor: muted,
        spikemode: "across", spikesnap: "hovered data", spikethickness: 1, spikedash: "solid" },
      shapes: panels.flatMap((panel) => panel.shapes || []), annotations: panels.flatMap((p) => p.annotations || []),
    };
    panels.forEach(({ label, log }, i) => {
      const type = log ? "log" : "linear";
      made[`yaxis${i + 1}`] = { ...axis, type, title: { text: label }, fixedrange: true, dtick: log ? "D2" : null };
    });
    return made;
  }

  // Arrow keys move the cursor, + and - change the range, Home shows every step.
  function keys(event, place, options) {
    const [low, high] = place.layout.xaxis.range;
    const at = place.step ?? (low + high) / 2, by = (high - low) / (event.shiftKey ? 20 : 200);
    const zoom = (factor) => Plotly.relayout(place, { "xaxis.range": [at - (at - low) * factor, at + (high - at) * factor] });
    const act = {
      ArrowRight: () => point(place, at + Math.max(1, by)), ArrowLeft: () => point(place, at - Math.max(1, by)),
      "+": () => zoom(0.5), "-": () => zoom(2), Home: () => Plotly.relayout(place, { "xaxis.autorange": true }),
      Escape: () => options.cursor?.(null, []),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  }

  // Moves the cursor to a step, as the pointer would.
  function point(place, step) {
    const [low, high] = place.layout.xaxis.range;
    const layer = place.querySelector(".nsewdrag"), box = layer.getBoundingClientRect();
    const clientX = box.left + box.width * (Math.max(low, Math.min(high, step)) - low) / (high - low);
    layer.dispatchEvent(new MouseEvent("mousemove", { clientX, clientY: box.top + box.height / 2, bubbles: true }));
  }

  // Panels over one axis of steps: [{ label, log, height, traces, shapes, annotations }], traces as Plotly's.
  // options: range [first, last], changed(range or null), cursor(step or null, points under it).
  async function draw(place, panels, options = {}) {
    await load("plotly.js");
    const traces = panels.flatMap((panel, i) => panel.traces.map((trace) => (
      { mode: "lines", hoverinfo: "none", ...trace, xaxis: "x", yaxis: i ? `y${i + 1}` : "y" })));
    const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
    await Plotly.react(place, traces, layout(panels, options.range), config);
    place.onkeydown = (event) => keys(event, place, options);
    if (!place.tabIndex || place.tabIndex < 0) place.tabIndex = 0;
    for (const name of ["plotly_hover", "plotly_unhover", "plotly_relayout"]) place.removeAllListeners(name);
    place.on("plotly_hover", ({ points, xvals }) => { place.step = points[0].x; options.cursor?.(place.step, points, xvals); });
    place.on("plotly_unhover", () => options.cursor?.(null, []));
    place.on("plotly_relayout", (change) => {
      if ("xaxis.range[0]" in change || "xaxis.range" in change) options.changed?.(place.layout.xaxis.range);
      if (change["xaxis.autorange"]) options.changed?.(null);
    });
    place.redraw = () => draw(place, panels, { ...options, range: place.layout.xaxis.autorange ? undefined : place.layout.xaxis.range });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of document.querySelectorAll(".js-plotly-plot")) place.redraw();
  });

  const traces = {}; // what the scripts in assets/traces/ leave here

  // The curves of a trial: name -> { x, y }.
  async function trace(id) {
    await load(`traces/${id}.js`);
    const steps = traces[id].steps.map(floats);
    const curves = Object.entries(traces[id].curves);
    return Object.fromEntries(curves.map(([name, [at, values]]) => [name, { x: steps[at], y: floats(values) }]));
  }

  return { draw, floats, load, point, style, trace, traces };
})();
