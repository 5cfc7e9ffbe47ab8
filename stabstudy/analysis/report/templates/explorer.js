// The step explorer of a trial's page: any range of its steps, its spikes, and both in the address of the page. Until
// the charts are drawn, and where they cannot be, the picture of the whole trace stands in its place.
"use strict";
{
  const MOST_ROWS = 3000; // drawn at once; of more, the smallest and largest of equal stretches
  const AROUND = 25; // rows shown on either side of a spike
  const PURPLE = "#b5548f", ORANGE = "#d55e00", GREY = "#7d8590"; // seen on white and on black

  const make = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const brief = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(4))) : "not finite");

  // The largest of 1, 2, 5, 10, 20 ... that is not above a size.
  function nice(size) {
    const power = 10 ** Math.floor(Math.log10(size));
    return power * [5, 2, 1].find((m) => m * power <= size * (1 + 1e-9));
  }

  // At least three round numbers between two.
  function ticks(low, high, log) {
    for (const digits of log ? [[1], [1, 3], [1, 2, 5]] : []) {
      const every = Math.ceil(Math.log10(high / low) / 8) || 1, found = [];
      for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d += 1) {
        if (d % every === 0) found.push(...digits.map((m) => m * 10 ** d).filter((v) => v >= low && v <= high));
      }
      if (found.length > 2) return found;
    }
    const by = nice((high - low) / 3.5), first = Math.ceil(low / by);
    return Array.from({ length: Math.floor(high / by) - first + 1 }, (_, i) => (first + i) * by);
  }

  function explore(figure) {
    const own = JSON.parse(figure.dataset.steps);
    const columns = Object.fromEntries(Object.entries(own.columns).map(([name, text]) => [name, charts.floats(text)]));
    const { step, grad_norm: norm, loss, mean } = columns, n = step.length;
    const curves = new Map(Object.entries(own.probes).map(([name, [x, y]]) => [name, [charts.floats(x), charts.floats(y)]]));
    for (const [name, label] of Object.entries(own.others)) curves.set(label, [step, columns[name]]);
    const peaks = [...new Set(own.spikes.map((spike) => spike[3]))].sort((a, b) => a - b);
    const rowOf = (s) => Math.max(0, (i => (i < 0 ? n - 1 : i))(step.findIndex((v) => v >= s)));
    const view = { from: 0, to: n - 1, pinned: null }; // rows, and a step

    // Controls

    const button = (text, act, title = "") => make("button", { type: "button", onclick: act, title }, text);
    const labelled = (text, input) => { input.addEventListener("change", draw); return make("label", {}, `${text} `, input); };
    const scale = (log) => make("select", {}, new Option("log", "log", log, log), new Option("linear", "", !log, !log));
    const [normScale, lossScale, moreScale] = [scale(true), scale(false), scale(false)];
    const smooth = make("input", { type: "checkbox", checked: true });
    const more = make("select", {}, new Option("nothing", ""), ...[...curves.keys()].map((name) => new Option(name, name)));
    more.selectedIndex = own.probes && curves.size ? 1 : 0;
    const ends = ["from", "to"].map((name) => {
      const input = make("input", { type: "number", min: step[0], max: step[n - 1] });
      input.addEventListener("change", () => go(rowOf(+ends[0].value), rowOf(+ends[1].value)));
      input.setAttribute("aria-label", `${name} step`);
      return input;
    });
    const out = make("output", {}), place = make("div", { className: "steps" });
    const bar = make("div", { className: "explore" }, "Steps ", ends[0], " to ", ends[1],
      button("−", () => around(2), "zoom out"), button("+", () => around(0.5), "zoom in"),
      button("◀", () => move(-0.5), "earlier"), button("▶", () => move(0.5), "later"),
      button("All", () => go(0, n - 1), "every step"),
      ...(peaks.length ? [button("◀ spike", () => hop(-1), "previous spike"), button("spike ▶", () => hop(1), "next spike")] : []),
      labelled("norm", normScale), labelled("loss", lossScale), labelled(`EMA over ${own.ema} steps`, smooth),
      ...(curves.size ? [labelled("below", more), labelled("its scale", moreScale)] : []),
      button("CSV of these steps", () => save(new Blob([csv()], { type: "text/csv" }), csvName())));

    // Where it is

    function go(from, to) {
      const size = Math.max(Math.min(2, n - 1), Math.min(n - 1, Math.round(to - from)));
      view.from = Math.max(0, Math.min(n - 1 - size, Math.round(from)));
      view.to = view.from + size;
      return draw();
    }
    const whole = () => view.from === 0 && view.to === n - 1;
    const middle = () => (view.pinned === null ? (view.from + view.to) / 2 : rowOf(view.pinned));
    const around = (factor, at = middle()) => go(at - (view.to - view.from) * factor / 2, at + (view.to - view.from) * factor / 2);
    const move = (share) => go(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));
    function show(s, half = AROUND) {
      view.pinned = s;
      return go(rowOf(s) - half, rowOf(s) + half);
    }
    function hop(by) {
      const at = view.pinned ?? (by > 0 ? -Infinity : Infinity), next = peaks.filter((s) => (s - at) * by > 0);
      return show(next.length ? next.at(by > 0 ? 0 : -1) : peaks.at(by > 0 ? 0 : -1));
    }
    function restore() {
      const [, a, b] = /steps=(\d+)-(\d+)/.exec(location.hash) || [], [, one] = /step=(\d+)/.exec(location.hash) || [];
      if (a === undefined && one === undefined) return draw();
      view.pinned = one === undefined ? null : +one;
      figure.parentElement.scrollIntoView();
      return a === undefined ? show(+one) : go(rowOf(+a), rowOf(+b));
    }
    function remember() {
      const parts = !whole() ? [`steps=${step[view.from]}-${step[view.to]}`] : [];
      if (view.pinned !== null) parts.push(`step=${view.pinned}`);
      if (parts.length || location.hash.startsWith("#step")) history.replaceState(null, "", `#${parts.join("&") || "trace"}`);
    }

    // What it shows

    // The rows to draw: no spike falls between them.
    function kept() {
      const [from, to] = [Math.max(0, view.from - 1), Math.min(n - 1, view.to + 1)];
      const stretch = Math.ceil(4 * (to - from + 1) / MOST_ROWS), rows = new Set([from]);
      for (let a = from; a <= to; a += stretch < 5 ? 1 : stretch) {
        if (stretch < 5) { rows.add(a); continue; }
        for (const values of [norm, loss]) {
          let low = -1, high = -1, lost = -1;
          for (let i = a; i <= Math.min(to, a + stretch - 1); i += 1) {
            if (!Number.isFinite(values[i])) lost = i;
            else if (low < 0 || values[i] < values[low]) low = i;
            if (Number.isFinite(values[i]) && (high < 0 || values[i] > values[high])) high = i;
          }
          for (const i of [low, high, lost]) if (i >= 0) rows.add(i);
        }
      }
      return [...rows.add(to)].sort((a, b) => a - b);
    }

    const late = () => own.warmup > (step[view.from] + step[view.to]) / 2; // the end of the warmup is on the right
    const note = (text, x, xanchor, more) => (
      { text, x, xanchor, xref: "x domain", yanchor: "bottom", showarrow: false, font: { size: 12 }, ...more });

    // A panel: lines [x, y, line], levels [name, height], on a scale that fits what is drawn of the lines.
    function panel(i, label, height, log, lines, levels, extra = []) {
      const inside = (x) => x >= step[view.from] && x <= step[view.to];
      const seen = lines.flatMap(([x, y]) => y.filter((v, j) => inside(x[j]) && Number.isFinite(v) && !(log && v <= 0)));
      if (whole()) seen.push(...levels.map(([, v]) => v));
      let low = Math.min(...seen), high = Math.max(...seen);
      if (!seen.length) [low, high] = [1, 2];
      if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - Math.abs(low) / 10 - 1e-9, high + Math.abs(high) / 10 + 1e-9];
      const on = log ? Math.log10 : (v) => v, off = log ? (v) => 10 ** v : (v) => v, margin = 0.06 * (on(high) - on(low));
      const range = [on(low) - margin, on(high) + margin], tickvals = ticks(off(range[0]), off(range[1]), log);
      const shown = levels.filter(([, v]) => on(v) >= range[0] && on(v) <= range[1]), y = `y${i || ""}`;
      const lost = lines.slice(0, 1).flatMap(([x, values]) => x.filter((s, j) => !Number.isFinite(values[j]) && inside(s)));
      const mode = lines[0][0].length < place.clientWidth / 8 ? "lines+markers" : "lines";
      return {
        height, log, axis: { range, autorange: false, tickvals, ticktext: tickvals.map(brief), dtick: null },
        traces: [...lines.map(([x, values, line], j) => ({ x, y: values, line, mode: j ? "lines" : mode, marker: { size: 5 } })), ...extra,
          { x: lost, y: lost.map(() => high), mode: "markers", marker: { symbol: "x", color: ORANGE }, hoverinfo: "skip" }],
        shapes: shown.map(([, v, color = GREY]) => (
          { type: "line", xref: "x domain", x0: 0, x1: 1, yref: y, y0: v, y1: v, line: { dash: "dash", width: 1.2, color } })),
        annotations: [...shown.map(([name, v, color]) => note(`${name} ${brief(v)}`, 1, "right", { yref: y, y: on(v), font: { size: 12, color } })),
          note(label, late() ? 0 : 1, late() ? "left" : "right", { yref: `${y} domain`, y: 1, font: { size: 13 } })],
      };
    }

    function panels() {
      const rows = kept(), at = rows.map((i) => step[i]), pick = (values) => rows.map((i) => values[i]);
      const ink = getComputedStyle(document.body).getPropertyValue("--ink");
      const high = own.absolute.filter((s) => s >= step[view.from] && s <= step[view.to]);
      const rings = { x: high, y: high.map((s) => norm[rowOf(s)]), mode: "markers", hoverinfo: "skip",
        marker: { symbol: "circle-open", size: 11, color: PURPLE, line: { width: 1.5 } } };
      const bold = smooth.checked ? [[at, pick(mean), { color: ink, width: 2.2 }]] : [];
      const all = [
        panel(0, own.labels[0], 250, !!normScale.value, [[at, pick(norm), { color: "#0072b2", width: 1.3 }]],
          own.clip ? [["clip", own.clip, ORANGE]] : [], [rings]),
        panel(2, own.labels[1], 190, !!lossScale.value, [[at, pick(loss), { color: "#008f68", width: 1.3 }], ...bold], own.levels),
      ];
      const [x, y] = curves.get(more.value) || [];
      if (x === step) all.push(panel(3, more.value, 150, !!moreScale.value, [[at, pick(y), { color: PURPLE, width: 1.3 }]], []));
      else if (x) all.push(panel(3, more.value, 150, !!moreScale.value, [[[...x], [...y], { color: PURPLE, width: 1.3 }]], []));
      for (const [series, start, end] of own.spikes.filter((s) => s[2] >= step[view.from] && s[1] <= step[view.to])) {
        all[series === "grad" ? 0 : 1].shapes.push({ type: "rect", x0: start - 0.5, x1: end + 0.5, y0: 0, y1: 1, opacity: 0.3,
          yref: series === "grad" ? "y domain" : "y2 domain", fillcolor: ORANGE, line: { width: 1, color: ORANGE } });
      }
      const upright = (s, dash) => all[0].shapes.push({ type: "line", x0: s, x1: s, yref: "paper", y0: 0, y1: 1, line: { dash, width: 1.3, color: GREY } });
      if (view.pinned !== null) upright(view.pinned, "solid");
      if (own.warmup && own.warmup >= step[view.from] && own.warmup <= step[view.to]) {
        upright(own.warmup, "dot");
        all[0].annotations.push(note("warmup ends", own.warmup, late() ? "right" : "left", { xref: "x", yref: "paper", y: 1 }));
      }
      return all;
    }

    const told = (i) => {
      const parts = [`step ${step[i]}`, `norm ${brief(norm[i])}`, `loss ${brief(loss[i])}`, `EMA ${brief(mean[i])}`];
      if (columns.clip_scale?.[i] < 1) parts.push(`clipped, times ${brief(columns.clip_scale[i])}`);
      const [x, y] = curves.get(more.value) || [[], []], j = x.findLastIndex((s) => s <= step[i]);
      if (j >= 0 && more.value !== own.others.clip_scale) parts.push(`${more.value} ${brief(y[j])}${x[j] < step[i] ? ` at ${x[j]}` : ""}`);
      if (own.spikes.some(([, a, b]) => step[i] >= a && step[i] <= b)) parts.push("in a spike");
      return parts.join(", ");
    };
    const still = () => (view.pinned === null ? `${view.to - view.from + 1} of ${n} recorded steps` : told(rowOf(view.pinned)));

    function csv() {
      const names = Object.keys(columns), lines = [names.join(",")];
      for (let i = view.from; i <= view.to; i += 1) lines.push(names.map((name) => columns[name][i]).join(","));
      return `${lines.join("\r\n")}\r\n`;
    }
    const csvName = () => `${own.trial}${!whole() ? `-steps-${step[view.from]}-${step[view.to]}` : ""}.csv`;

    function changed(range) {
      const [from, to] = range ? [rowOf(Math.ceil(range[0])), rowOf(Math.floor(range[1]))] : [0, n - 1];
      if (from !== view.from || to !== view.to) go(from, Math.max(to, from + 2));
    }

    async function draw() {
      const [first, last] = [step[view.from], step[view.to]], span = last - first + 1;
      const dtick = Math.max(1, nice(span / Math.max(3.5, place.clientWidth / 180)));
      [ends[0].value, ends[1].value] = [first, last];
      place.setAttribute("aria-label", `Steps ${first} to ${last}: the arrow keys move the cursor, + and - zoom, Home shows all`);
      out.textContent = still();
      remember();
      await charts.draw(place, panels(), {
        range: [first - 0.5, last + 0.5], changed, axis: { dtick, tick0: 0 }, margin: { t: 24 },
        cursor: (at) => { out.textContent = at === null ? still() : told(rowOf(at)); },
      });
    }

    const picture = figure.querySelector(".scroll");
    place.setAttribute("role", "application");
    picture.before(bar, out, place);
    restore().then(() => {
      const whole = make("details", {}, make("summary", {}, "The whole trace as one picture"));
      const hint = "Drag to choose a range, double-click for all, click to keep a step in the address of this page.";
      picture.replaceWith(make("p", { className: "hint" }, hint), whole);
      whole.append(picture);
      place.on("plotly_click", ({ points }) => { view.pinned = step[rowOf(points[0].x)]; draw(); });
      window.addEventListener("hashchange", restore);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    }, (error) => {
      for (const part of [bar, place]) part.remove();
      out.replaceWith(make("p", { className: "hint" }, error.message));
    });
  }

  for (const figure of document.querySelectorAll("figure[data-steps]")) explore(figure);
}
