// Reads figures: the values of the mark under the pointer, or chosen with the arrow keys. On the page of a trial it also
// draws any range of its steps. Every figure is complete without it.
"use strict";
{
  const REACH = 40; // CSS pixels: a mark further away is not meant

  const make = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  const tip = make("div", { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  const ring = make("div", { className: "ring", hidden: true });
  document.body.append(ring, tip);

  const hide = () => { tip.hidden = ring.hidden = true; };

  // Both stand where (x, y) of the window is; the words stay inside it.
  function show(x, y, text) {
    tip.textContent = text;
    tip.hidden = ring.hidden = false;
    ring.style.left = `${x}px`;
    ring.style.top = `${y}px`;
    const { width, height } = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, Math.min(right - width - 4, x - width / 2))}px`;
    tip.style.top = `${y - height - 14 < 4 ? y + 14 : y - height - 14}px`;
  }

  function said(series, i) {
    const first = series.x ? `${series.x} ${series.a[i]}` : series.a[i];
    const second = series.y ? `${series.y} ${series.b[i]}` : series.b[i];
    const trial = series.trials ? ` (trial ${series.trials[i]})` : "";
    return `${series.name ? `${series.name}: ` : ""}${first}, ${second}${trial}`;
  }

  function readable(figure) {
    const all = JSON.parse(figure.dataset.marks).filter((series) => series.at.length);
    if (!all.length) return false;
    const image = figure.querySelector("img");
    const region = figure.querySelector(".scroll");
    const folder = figure.dataset.trials;
    let chosen = null; // [series, mark]

    const place = (series, i) => {
      const box = image.getBoundingClientRect();
      return [box.left + series.at[2 * i] * box.width / 1e4, box.top + series.at[2 * i + 1] * box.height / 1e4];
    };
    const choose = (s, i) => {
      chosen = [s, i];
      show(...place(all[s], i), said(all[s], i));
    };
    const follow = () => {
      const trial = chosen && all[chosen[0]].trials && all[chosen[0]].trials[chosen[1]];
      if (trial && folder !== undefined) location.href = `${folder}${trial}.html`;
    };
    const nearest = (event) => {
      let best = [REACH, -1, -1];
      all.forEach((series, s) => {
        for (let i = 0; i < series.a.length; i += 1) {
          const [x, y] = place(series, i);
          const far = Math.hypot(x - event.clientX, y - event.clientY);
          // of marks at one place a trial is the one that can be followed
          if (far < best[0] || (far === best[0] && series.trials)) best = [far, s, i];
        }
      });
      if (best[1] < 0) { chosen = null; hide(); } else choose(best[1], best[2]);
    };
    image.addEventListener("pointermove", nearest);
    image.addEventListener("pointerdown", nearest);
    image.addEventListener("pointerleave", hide);
    image.addEventListener("click", (event) => { if (event.detail === 1) follow(); });
    region.addEventListener("blur", hide);
    region.addEventListener("keydown", (event) => {
      const [s, i] = chosen || [0, -1];
      const last = all[s].a.length - 1;
      const other = (by) => {
        const to = (s + by + all.length) % all.length;
        return [to, Math.max(0, Math.min(i, all[to].a.length - 1))];
      };
      const to = {
        ArrowRight: () => [s, Math.min(last, i + 1)], ArrowLeft: () => [s, Math.max(0, i - 1)],
        ArrowDown: () => other(1), ArrowUp: () => other(-1), Home: () => [s, 0], End: () => [s, last],
      }[event.key];
      if (to) { event.preventDefault(); choose(...to()); }
      if (event.key === "Enter") follow();
      if (event.key === "Escape") { chosen = null; hide(); }
    });
    return true;
  }

  document.addEventListener("scroll", hide, { capture: true, passive: true });

  const drawn = [...document.querySelectorAll("figure[data-marks]")].filter(readable);
  const shown = drawn.filter(({ dataset }) => dataset.steps === undefined); // that of the steps is folded away below
  if (shown.length) {
    const opens = shown.some(({ dataset }) => dataset.trials !== undefined && dataset.marks.includes('"trials"'));
    const hint = "Point at a mark to read its values, or focus a figure and use the arrow keys."
      + (opens ? " A click, or Enter, on the mark of a trial opens its page." : "");
    const spot = document.querySelector("p.glossary");
    const before = shown[0].previousElementSibling || shown[0];
    const words = make("p", { className: "hint" }, hint);
    if (spot) spot.after(words); else before.before(words);
  }

  // The steps of a trial, any range of them

  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 66, RIGHT = 12, PANELS = [[18, 240], [288, 160]], H = 500; // CSS pixels, as wide as the page has room

  function floats(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  function brief(v) {
    if (!Number.isFinite(v)) return "not finite";
    const far = v !== 0 && (Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3);
    return far ? v.toExponential(3).replace(/\.?0*e\+?/, "e") : String(Number(v.toPrecision(4)));
  }

  function ticks(low, high, log, most = 5) {
    const found = [];
    if (log && high / low > 5) {
      for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d += 1) {
        for (const m of high / low > 1e3 ? [1] : [1, 2, 5]) found.push(m * 10 ** d);
      }
    } else {
      const raw = (high - low) / most;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
      for (let i = Math.ceil(low / step); i <= high / step; i += 1) found.push(i * step);
    }
    return found.filter((v) => v >= low && v <= high);
  }

  function explorer(figure) {
    const own = JSON.parse(figure.dataset.steps);
    const columns = Object.fromEntries(Object.entries(own.columns).map(([name, text]) => [name, floats(text)]));
    const step = columns.step;
    const n = step.length;
    let [from, to] = [0, n - 1]; // rows
    let W = 1000;
    const inputs = ["From step", "to step"].map((text) => {
      const input = make("input", { type: "number", min: step[0], max: step[n - 1] });
      return [make("label", {}, `${text} `, input), input];
    });
    const logs = make("input", { type: "checkbox", checked: true });
    const out = make("output", {});
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "img");

    const add = (name, attributes, text) => {
      const made = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text !== undefined) made.textContent = text;
      svg.append(made);
      return made;
    };
    const across = (i) => LEFT + (W - LEFT - RIGHT) * (to > from ? (i - from) / (to - from) : 0.5);
    const row = (x) => Math.round(from + (x - LEFT) / (W - LEFT - RIGHT) * (to - from));

    // The lowest and highest of each column of pixels: no step falls between.
    function points(values) {
      const stretch = Math.max(1, Math.floor((to - from + 1) / (W - LEFT)));
      const kept = [];
      for (let a = from; a <= to; a += stretch) {
        let low = -1, high = -1;
        for (let i = a; i < Math.min(to + 1, a + stretch); i += 1) {
          if (!Number.isFinite(values[i])) continue;
          if (low < 0 || values[i] < values[low]) low = i;
          if (high < 0 || values[i] > values[high]) high = i;
        }
        if (low >= 0) kept.push(...(low === high ? [low] : [Math.min(low, high), Math.max(low, high)]));
        else kept.push(-1); // a gap
      }
      return kept;
    }

    function panel([top, height], name, label, log, series) {
      const values = columns[name];
      const seen = [];
      for (let i = from; i <= to; i += 1) if (Number.isFinite(values[i]) && !(log && values[i] <= 0)) seen.push(values[i]);
      let low = seen.reduce((a, b) => Math.min(a, b), Infinity);
      let high = seen.reduce((a, b) => Math.max(a, b), -Infinity);
      if (!seen.length) [low, high] = [1, 2];
      if (low === high) [low, high] = [low - Math.abs(low) * 0.1 - 1e-6, high + Math.abs(high) * 0.1 + 1e-6];
      const scale = log ? Math.log : (v) => v;
      const margin = (scale(high) - scale(low)) * 0.05;
      const [bottom, span] = [scale(low) - margin, scale(high) - scale(low) + 2 * margin];
      const up = (v) => top + height * (1 - (scale(v) - bottom) / span);
      add("rect", { class: "frame", x: LEFT, y: top, width: W - LEFT - RIGHT, height });
      for (const tick of ticks(low, high, log)) {
        add("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: up(tick), y2: up(tick) });
        add("text", { x: LEFT - 6, y: up(tick) + 5, "text-anchor": "end" }, brief(tick));
      }
      const turned = `translate(13 ${top + height / 2}) rotate(-90)`;
      add("text", { "text-anchor": "middle", transform: turned }, label);
      const past = own.warmup ? step.findIndex((s) => s >= own.warmup) : -1;
      if (past > from && past <= to) {
        const x = across(past - (step[past] - own.warmup) / (step[past] - step[past - 1]));
        add("line", { class: "warmup", x1: x, x2: x, y1: top, y2: top + height });
        if (series === "grad") add("text", { class: "note", x: x + 4, y: top + 13 }, "warmup ends");
      }
      for (const [which, a, b, at] of own.spikes) {
        const [start, end] = [step.indexOf(a), step.indexOf(b)];
        if (which === series && end >= from && start <= to) {
          const x = across(Math.max(from, start - 0.5));
          const width = Math.max(1.5, across(Math.min(to, end + 0.5)) - x);
          add("rect", { class: "spike", x, y: top, width, height });
          const peak = step.indexOf(at);
          if (peak >= from && peak <= to) add("path", { class: "peak", d: `M${across(peak) - 5} ${top - 9}h10l-5 8z` });
        }
      }
      if (name === "grad_norm" && own.clip && own.clip > low && own.clip < high) {
        add("line", { class: "clip", x1: LEFT, x2: W - RIGHT, y1: up(own.clip), y2: up(own.clip) });
        const words = { class: "clip", x: W - RIGHT - 4, y: up(own.clip) - 4, "text-anchor": "end" };
        add("text", words, `clip ${brief(own.clip)}`);
      }
      let path = "", pen = "M";
      for (const i of points(values)) {
        if (i < 0) { pen = "M"; continue; }
        if (log && values[i] <= 0) continue;
        path += `${pen}${across(i).toFixed(1)} ${up(values[i]).toFixed(1)}`;
        pen = "L";
      }
      add("path", { class: series, d: path });
      const dots = to - from < (W - LEFT) / 8;
      for (const s of series === "grad" ? own.absolute : []) {
        const i = step.indexOf(s);
        if (i >= from && i <= to) add("circle", { class: "absolute", cx: across(i), cy: up(values[i]), r: 6 });
      }
      for (let i = from; i <= to; i += 1) {
        if (!Number.isFinite(values[i])) add("text", { class: "lost", x: across(i), y: top + 12, "text-anchor": "middle" }, "✕");
        else if (dots && !(log && values[i] <= 0)) add("circle", { class: series, cx: across(i), cy: up(values[i]), r: 2.5 });
      }
    }

    function draw() {
      W = Math.max(300, svg.clientWidth || 1000);
      svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
      svg.replaceChildren();
      panel(PANELS[0], "grad_norm", own.norm_label, logs.checked, "grad");
      panel(PANELS[1], "loss", own.loss_label, false, "loss");
      for (const tick of ticks(step[from], Math.max(step[to], step[from] + 1), false, W / 130)) {
        const at = step.findIndex((s) => s >= tick);
        if (Number.isInteger(tick) && at >= from && at <= to) add("text", { x: across(at), y: 466, "text-anchor": "middle" }, tick);
      }
      add("text", { x: (W + LEFT) / 2, y: 490, "text-anchor": "middle" }, "optimizer step");
      inputs[0][1].value = step[from];
      inputs[1][1].value = step[to];
      svg.setAttribute("aria-label", `Steps ${step[from]} to ${step[to]}`);
      out.textContent = `${to - from + 1} of ${n} recorded steps`;
    }
    const go = (a, b) => {
      const size = Math.max(1, Math.min(n - 1, Math.round(b - a)));
      from = Math.max(0, Math.min(n - 1 - size, Math.round(a)));
      to = from + size;
      hide();
      draw();
    };
    const around = (factor, at = (from + to) / 2) => go(at - (at - from) * factor, at + (to - at) * factor);
    const move = (share) => go(from + share * (to - from), to + share * (to - from));

    let reading = from;
    const read = (i, event) => {
      reading = Math.max(from, Math.min(to, i));
      const box = svg.getBoundingClientRect();
      const parts = [`step ${step[reading]}`, `norm ${brief(columns.grad_norm[reading])}`];
      parts.push(`loss ${brief(columns.loss[reading])}`);
      const scale = columns.clip_scale && columns.clip_scale[reading];
      if (scale < 1) parts.push(`clipped, times ${brief(scale)}`);
      if (own.spikes.some(([, a, b]) => step[reading] >= a && step[reading] <= b)) parts.push("in a spike");
      show(box.left + across(reading) * box.width / W, event ? event.clientY : box.top + box.height / 3, parts.join(", "));
    };
    const at = (event) => {
      const box = svg.getBoundingClientRect();
      return row((event.clientX - box.left) / box.width * W);
    };
    let start = null;
    svg.addEventListener("pointerdown", (event) => { start = at(event); });
    svg.addEventListener("pointermove", (event) => read(at(event), event));
    svg.addEventListener("pointerup", (event) => {
      const end = at(event);
      if (start !== null && Math.abs(end - start) > 1) go(Math.min(start, end), Math.max(start, end));
      start = null;
    });
    svg.addEventListener("pointerleave", () => { start = null; hide(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("dblclick", () => go(0, n - 1));
    svg.addEventListener("keydown", (event) => {
      const act = {
        ArrowRight: () => read(reading + 1), ArrowLeft: () => read(reading - 1), "+": () => around(0.5, reading),
        "-": () => around(2, reading), Escape: hide, Home: () => read(from), End: () => read(to),
      }[event.key];
      if (act) { event.preventDefault(); act(); }
    });
    for (const [, input] of inputs) {
      input.addEventListener("change", () => {
        const [a, b] = inputs.map(([, i]) => Number(i.value));
        const end = step.findLastIndex((s) => s <= b);
        go(Math.max(0, step.findIndex((s) => s >= a)), end < 0 ? n - 1 : end);
      });
    }
    logs.addEventListener("change", draw);

    const rows = () => {
      const names = Object.keys(columns);
      const lines = [names.join(",")];
      for (let i = 0; i < n; i += 1) lines.push(names.map((name) => columns[name][i]).join(","));
      return `${lines.join("\r\n")}\r\n`;
    };
    const button = (text, action, title) => make("button", { type: "button", onclick: action, title: title || "" }, text);
    const bar = make("div", { className: "explore" },
      inputs[0][0], inputs[1][0],
      button("−", () => around(2), "zoom out"), button("+", () => around(0.5), "zoom in"),
      button("◀", () => move(-0.5), "earlier"), button("▶", () => move(0.5), "later"),
      button("All", () => go(0, n - 1), "every step"),
      ...own.spikes.length ? [button("Highest spike", () => {
        const [, a, b] = own.spikes[own.highest];
        const [first, last] = [step.indexOf(a), step.indexOf(b)];
        go(first - 25, last + 25);
      }, "25 steps around it")] : [],
      make("label", {}, logs, " log scale of the norm"), out,
      button("CSV of every step", () => save(new Blob([rows()], { type: "text/csv" }), `${own.trial}.csv`)));
    const help = "Every recorded step: drag to choose a range, double-click for all; with the keyboard, the arrow keys "
      + "read steps and + and - change the range.";
    const whole = make("details", {}, make("summary", {}, "The whole trace as one picture"));
    const picture = figure.querySelector(".scroll");
    picture.replaceWith(bar, svg, make("p", { className: "hint" }, help), whole);
    whole.append(picture);
    new ResizeObserver(() => { if (svg.clientWidth !== W) { hide(); draw(); } }).observe(svg);
    draw();
  }

  // Downloads of a trial's figures: the picture is in the page already.

  function save(blob, name) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function downloads(figure) {
    const image = figure.querySelector("img");
    const name = `${figure.dataset.file}`;
    const png = () => {
      const canvas = make("canvas", { width: 2 * image.naturalWidth, height: 2 * image.naturalHeight });
      const pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, `${name}.png`));
    };
    const files = make("span", { className: "files" },
      make("a", { href: image.src, download: `${name}.svg` }, "SVG"), " ",
      make("button", { type: "button", onclick: png }, "PNG"));
    figure.querySelector("figcaption").append(" ", files);
  }

  for (const figure of document.querySelectorAll("figure[data-steps]")) explorer(figure);
  for (const figure of document.querySelectorAll("figure[data-file]")) downloads(figure);
}
