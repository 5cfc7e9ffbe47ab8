// The step explorer of a trial's page: any range of its steps and each of its spikes, both in the address of the page.
// Until it is drawn, and where it cannot be, the picture of the whole trace stands in its place.
"use strict";
{
  const AROUND = 25; // rows shown on either side of a step that is asked for
  const { brief, nice, ticks } = charts;
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();

  const line = (s, dash) => (
    { type: "line", x0: s, x1: s, yref: "paper", y0: 0, y1: 1, line: { dash, width: 1.3, color: css("--muted") } });
  const note = (text, more) => (
    { text, x: 0, xref: "x domain", xanchor: "left", yanchor: "bottom", showarrow: false, ...more });

  // A panel: curves { x, y, line }, levels [name, height], on a scale that fits the curves `inside`, or the levels too.
  function panel(y, label, log, inside, curves, levels, all = false) {
    const seen = curves.flatMap((one) => [...one.y].filter((v, i) => inside(one.x[i])));
    const heights = all ? levels.map(([, v]) => v) : [];
    const fit = [...seen, ...heights].filter((v) => Number.isFinite(v) && !(log && v <= 0));
    let [low, high] = fit.length ? [Math.min, Math.max].map((best) => fit.reduce((a, b) => best(a, b))) : [1, 2];
    if (low === high) [low, high] = log ? [low / 1.1, high * 1.1] : [low - 0.1, high + 0.1];
    const [on, off] = log ? [Math.log10, (v) => 10 ** v] : [(v) => v, (v) => v], margin = 0.06 * (on(high) - on(low));
    const range = [on(low) - margin, on(high) + margin], tickvals = ticks(...range.map(off), log);
    const shown = levels.filter(([, v]) => on(v) >= range[0] && on(v) <= range[1]);
    const [{ x, y: values }] = curves, gaps = fit.length ? [...x].filter((_, i) => !Number.isFinite(values[i])) : [];
    const lost = gaps.filter((_, i) => i % Math.ceil(gaps.length / 500) === 0); // a mark each would take minutes
    const cross = { mode: "markers", marker: { symbol: "x", color: css("--mark") }, hoverinfo: "skip" };
    return {
      log, axis: { range, autorange: false, dtick: null, tickvals, ticktext: tickvals.map(brief) },
      traces: [...curves, { x: lost, y: lost.map(() => high), ...cross }],
      shapes: shown.map(([, v]) => ({ ...line(0, "dash"), xref: "x domain", x1: 1, yref: y, y0: v, y1: v })),
      annotations: [note(label, { y: 1, yref: `${y} domain`, font: { size: 13 } }),
        ...shown.map(([name, v]) => note(`${name} ${brief(v)}`, { x: 1, xanchor: "right", yref: y, y: on(v) }))],
    };
  }

  function explore(figure) {
    const own = JSON.parse(figure.dataset.steps);
    const columns = Object.fromEntries(Object.entries(own.columns).map(([name, text]) => [name, charts.floats(text)]));
    const { step, grad_norm: norm, loss, mean } = columns, n = step.length;
    const curves = new Map(Object.entries(own.probes).map(([name, xy]) => [name, xy.map(charts.floats)]));
    for (const [name, label] of Object.entries(own.others)) curves.set(label, [step, columns[name]]);
    const peaks = [...new Set(own.spikes.map((spike) => spike[3]))].sort((a, b) => a - b);
    const rowOf = (s) => { const i = step.findIndex((v) => v >= s); return i < 0 ? n - 1 : i; };
    let from = 0, to = n - 1, pinned = null; // rows, and a step
    const whole = () => from === 0 && to === n - 1, inside = (s) => s >= step[from] && s <= step[to];

    // Controls

    const control = (name, tag, properties, ...children) => {
      const made = make(tag, { ...properties, ariaLabel: name }, ...children);
      made.addEventListener("change", draw);
      return made;
    };
    const choice = (name, options) => control(name, "select", {}, ...options.map((text) => new Option(text)));
    const button = (text, title, onclick) => make("button", { type: "button", onclick, title }, text);
    const scales = [choice("scale of the norm", ["log", "linear"]), choice("scale of the loss", ["linear", "log"])];
    const more = choice("below", [...curves.keys(), "nothing"]), ema = `EMA over ${own.ema} steps`;
    const smooth = control(ema, "input", { type: "checkbox", checked: true });
    const ends = ["from step", "to step"].map((name) => make("input", { type: "number", ariaLabel: name }));
    for (const end of ends) end.addEventListener("change", () => go(...ends.map(({ value }) => rowOf(+value))));
    const place = make("div", { className: "steps", role: "application" }), out = make("output", {});
    const bar = make("div", { className: "explore" }, make("span", {}, "steps ", ends[0], " to ", ends[1]),
      button("−", "zoom out", () => zoom(2)), button("+", "zoom in", () => zoom(0.5)),
      button("All", "every step", () => { pinned = null; go(0, n - 1); }),
      button("◀ spike", "previous spike", () => hop(-1)), button("spike ▶", "next spike", () => hop(1)),
      make("span", {}, "norm ", scales[0]), make("span", {}, "loss ", scales[1]), make("span", {}, smooth, ` ${ema}`),
      make("span", {}, "below ", more), button("CSV", "these steps as CSV", csv));
    for (const one of peaks.length ? [] : bar.querySelectorAll("[title$=spike]")) one.remove();
    if (!curves.size) more.parentElement.remove();

    // The view, in the address as #steps=120-180&step=131

    function go(a, b) {
      const size = Math.max(Math.min(2, n - 1), Math.min(n - 1, Math.round(b - a)));
      from = Math.max(0, Math.min(n - 1 - size, Math.round(a)));
      to = from + size;
      return draw();
    }
    function zoom(factor) {
      const middle = pinned === null ? (from + to) / 2 : rowOf(pinned), half = (to - from) * factor / 2;
      return go(middle - half, middle + half);
    }
    function hop(by) {
      const rest = peaks.filter((s) => pinned === null || (s - pinned) * by > 0);
      pinned = (rest.length ? rest : peaks).at(by > 0 ? 0 : -1); // behind the last the first
      return go(rowOf(pinned) - AROUND, rowOf(pinned) + AROUND);
    }
    function restore() {
      const asked = (form) => form.exec(location.hash)?.slice(1).map(Number);
      const range = asked(/steps=(\d+)-(\d+)/), one = asked(/step=(\d+)/);
      if (range || one) figure.parentElement.scrollIntoView();
      pinned = one ? one[0] : null;
      return range ? go(...range.map(rowOf)) : one ? go(rowOf(pinned) - AROUND, rowOf(pinned) + AROUND) : go(from, to);
    }
    function remember() {
      const parts = [whole() ? "" : `steps=${step[from]}-${step[to]}`, pinned === null ? "" : `step=${pinned}`];
      const view = parts.filter(Boolean).join("&");
      if (view || location.hash.startsWith("#step")) history.replaceState(null, "", `#${view || "trace"}`);
    }

    function panels() {
      const stroke = (colour, width = 1.3) => ({ line: { color: css(colour), width },
        mode: width < 2 && to - from < 120 ? "lines+markers" : "lines", marker: { size: 5 } });
      const part = (values) => values.subarray(Math.max(0, from - 1), to + 2); // a mark for each row takes time
      const bold = smooth.checked ? [{ x: part(step), y: part(mean), ...stroke("--ink", 2.2) }] : [];
      const clip = own.clip ? [["clip", own.clip]] : [], [x, y] = curves.get(more.value) || [];
      const below = x === step ? { x: part(x), y: part(y) } : { x, y };
      const log = scales.map(({ value }) => value === "log");
      const all = [
        panel("y", own.labels[0], log[0], inside, [{ x: part(step), y: part(norm), ...stroke("--link") }], clip),
        panel("y2", own.labels[1], log[1], inside, [{ x: part(step), y: part(loss), ...stroke("--stable") }, ...bold],
          own.levels, whole()),
        ...(x ? [panel("y3", more.value, false, inside, [{ ...below, ...stroke("--diverged") }], [])] : []),
      ];
      const [ring, mark] = ["--diverged", "--mark"].map(css);
      const rings = own.absolute.filter(inside);
      all[0].traces.push({ x: rings, y: rings.map((s) => norm[rowOf(s)]), mode: "markers",
        marker: { symbol: "circle-open", size: 11, color: ring, line: { width: 1.5 } }, hoverinfo: "skip" });
      for (const [series, start, end] of own.spikes.filter(([, a, b]) => b >= step[from] && a <= step[to])) {
        all[0].shapes.push({ type: "rect", x0: start - 0.5, x1: end + 0.5, y0: 0, y1: 1, opacity: 0.3, fillcolor: mark,
          yref: series === "grad" ? "y domain" : "y2 domain", line: { width: 1, color: mark } });
      }
      if (pinned !== null) all[0].shapes.push(line(pinned, "solid"));
      if (own.warmup && inside(own.warmup)) {
        const late = own.warmup > (step[from] + step[to]) / 2, xanchor = late ? "right" : "left";
        if (!late) Object.assign(all[0].annotations[0], { x: 1, xanchor: "right" }); // it makes room
        all[0].shapes.push(line(own.warmup, "dot"));
        const wide = place.clientWidth > 560; // narrower, the name of the panel needs the line
        if (wide) all[0].annotations.push(note("warmup ends", { x: own.warmup, xref: "x", xanchor, y: 1, yref: "paper" }));
      }
      return all;
    }

    function reading(i) {
      const parts = [`step ${step[i]}`, `norm ${brief(norm[i])}`, `loss ${brief(loss[i])}`, `EMA ${brief(mean[i])}`];
      if (columns.clip_scale?.[i] < 1) parts.push(`clipped, times ${brief(columns.clip_scale[i])}`);
      const [x, y] = curves.get(more.value) || [[]], j = x.findLastIndex((s) => s <= step[i]);
      if (j >= 0) parts.push(`${more.value} ${brief(y[j])}${x[j] < step[i] ? ` at ${x[j]}` : ""}`);
      if (own.spikes.some(([, a, b]) => step[i] >= a && step[i] <= b)) parts.push("in a spike");
      return parts.join(", ");
    }
    const still = () => (pinned === null ? `${to - from + 1} of ${n} recorded steps` : reading(rowOf(pinned)));

    function csv() {
      const rows = [Object.keys(columns)], name = whole() ? own.trial : `${own.trial}-steps-${step[from]}-${step[to]}`;
      for (let i = from; i <= to; i += 1) rows.push(Object.values(columns).map((values) => values[i]));
      save(new Blob(rows.map((row) => `${row.join(",")}\r\n`), { type: "text/csv" }), `${name}.csv`);
    }

    function draw() {
      out.textContent = still();
      for (const [i, row] of [from, to].entries()) ends[i].value = step[row];
      remember();
      place.ariaLabel = `Steps ${step[from]} to ${step[to]}: arrow keys move the cursor, + and - zoom, Home shows all`;
      const dtick = Math.max(1, nice((step[to] - step[from] + 1) / Math.max(3.5, place.clientWidth / 180)));
      const changed = (range) => { // by the pointer or the keyboard
        const [a, b] = range ? [rowOf(Math.ceil(range[0])), rowOf(Math.floor(range[1]))] : [0, n - 1];
        if (a !== from || b !== to) go(a, b);
      };
      const cursor = (at) => { out.textContent = at === null ? still() : reading(rowOf(at)); };
      const range = [step[from] - 0.5, step[to] + 0.5], axis = { dtick, tick0: 0, tickformat: "d" }, margin = { t: 24 };
      return charts.draw(place, panels(), { range, axis, margin, changed, cursor });
    }

    const picture = figure.querySelector(".scroll");
    picture.before(bar, out, place);
    restore().then(() => {
      const folded = make("details", {}, make("summary", {}, "The whole trace as one picture"));
      const hint = "Drag to choose a range, double-click for all; a click keeps a step in the address of this page.";
      picture.replaceWith(make("p", { className: "hint" }, hint), folded);
      folded.append(picture);
      place.on("plotly_click", ({ points }) => { pinned = points[0].x; draw(); });
      window.addEventListener("hashchange", restore);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    }, ({ message }) => {
      for (const part of [bar, place]) part.remove();
      out.replaceWith(make("p", { className: "hint" }, message));
    });
  }

  for (const figure of document.querySelectorAll("figure[data-steps]")) explore(figure);
}
