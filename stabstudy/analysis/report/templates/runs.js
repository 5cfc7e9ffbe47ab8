// All runs: chosen ones overlaid, parallel coordinates that filter the table, and the view in the address.
"use strict";
{
  const MOST = 24; // traces in one overlay
  const table = document.getElementById("all");
  const rows = [...table.tBodies[0].rows];
  const axes = [...table.tHead.rows[0].cells].map((head, i) => [i, head]).filter(([, head]) => head.matches(".axis"));
  const name = (row) => axes.map(([i, head]) => `${head.textContent} ${row.cells[i].textContent}`).join(", ");
  const { labels, log } = JSON.parse(table.dataset.curves);
  const view = { range: null, hidden: new Set(), drawn: 0 };

  // Chosen runs

  const boxes = rows.filter((row) => row.dataset.trial).map((row) => {
    const box = make("input", { type: "checkbox", defaultChecked: "chosen" in row.dataset, value: row.dataset.trial });
    box.setAttribute("aria-label", `Overlay ${box.value}`);
    row.cells[0].prepend(box, " ");
    box.row = row;
    return box;
  });
  const chosen = () => boxes.filter((box) => box.checked);
  const choose = (wanted) => { for (const box of boxes) box.checked = wanted(box); changed(); };
  const button = (words, act) => make("button", { type: "button", onclick: act }, words);
  const also = make("select", {}, ...Object.entries(labels).slice(3).map(([key, label]) => new Option(label, key)));
  also.prepend(new Option("nothing more", "", true, true));
  const place = make("div", { className: "chart" });
  const legend = make("table", { className: "legend" });
  const note = make("p", { className: "hint" });
  document.getElementById("overlay").append(
    make("div", { className: "explore" }, make("label", {}, "Also show ", also),
      button("Choose the runs shown", () => choose((box) => !box.row.hidden)), button("Choose none", () => choose(() => false))),
    place, legend, note);
  also.addEventListener("change", () => changed());
  table.addEventListener("change", () => changed());

  // The overlay

  async function overlay() {
    const turn = view.drawn += 1, some = chosen().slice(0, MOST);
    const left = chosen().length - some.length;
    note.textContent = !some.length ? "Tick runs in the table below to lay their curves over each other."
      : "Drag over the curves to zoom, double-click for every step; arrow keys move the cursor, + and - zoom."
        + (left ? ` ${left} more chosen runs are not drawn.` : "");
    place.hidden = legend.hidden = !some.length;
    if (!some.length) return;
    try {
      const traces = await Promise.all(some.map((box) => charts.trace(box.value)));
      const keys = [...Object.keys(labels).slice(0, 3), also.value].filter((key) => traces.some((trace) => key in trace));
      const panels = keys.map((key, panel) => ({ label: labels[key], log: log.includes(key), height: panel ? 150 : 210,
        traces: traces.flatMap((trace, i) => (key in trace ? [{ ...trace[key], meta: [i, panel], name: some[i].value,
          visible: !view.hidden.has(some[i].value), line: { ...charts.style(i), width: 1.4 } }] : [])) }));
      if (turn !== view.drawn) return;
      const cursor = entries(some, keys);
      await charts.draw(place, panels, { range: view.range || undefined, cursor, changed: (range) => { view.range = range; save(); } });
    } catch (error) { note.textContent = error.message; place.hidden = legend.hidden = true; }
  }

  // The legend: a row per run, to hide or open it, with its values at the cursor. Returns what moves them.
  function entries(some, keys) {
    const cells = some.map((box, i) => {
      const { color, dash } = charts.style(i);
      const hide = button("", () => { view.hidden[view.hidden.has(box.value) ? "delete" : "add"](box.value); overlay(); });
      hide.append(make("span", { className: `swatch ${dash}` }), ` ${name(box.row)}`);
      hide.firstChild.style.borderTopColor = color;
      hide.setAttribute("aria-pressed", !view.hidden.has(box.value));
      return [make("th", { scope: "row" }, hide), ...keys.map(() => make("td", { className: "n" })),
        make("td", {}, box.row.cells[0].lastElementChild.cloneNode(true))];
    });
    const at = make("th", { scope: "col" }, "click hides");
    const heads = [at, ...keys.map((key) => make("th", { scope: "col", className: "n" }, labels[key])), make("th", { scope: "col" }, "page")];
    legend.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...cells.map((row) => make("tr", {}, ...row))));
    return (step, points) => {
      at.textContent = step === null ? "click hides" : `step ${step}`;
      for (const row of cells) for (const cell of row.slice(1, -1)) cell.textContent = "";
      for (const { data, y } of points) cells[data.meta[0]][data.meta[1] + 1].textContent = Number(y.toPrecision(4));
    };
  }

  // Parallel coordinates: what is brushed is written into the filter, and the filter is drawn on the scales.

  const picture = document.getElementById("parallel");
  const lines = [...picture.querySelectorAll("path")].map((path) => (
    { path, row: rows[path.dataset.row], points: [...path.getAttribute("d").matchAll(/([\d.]+) ([\d.]+)/g)].map((p) => [+p[1], +p[2]]) }));
  const scales = [...picture.querySelectorAll(".scale")].map((scale) => (
    { scale, stops: JSON.parse(scale.dataset.stops), column: table.columns.get(scale.dataset.name), brush: scale.querySelector(".brush") }));

  const tests = (column) => table.asked.tests.filter((test) => test.column === column);
  const value = (text) => (typeof key(text) === "number" ? key(text) / (text.endsWith("%") ? 100 : 1) : null);
  const within = ({ stops, column }) => stops.filter(([text]) => tests(column).every(({ holds }) => holds(text, value(text))));

  function brush({ scale, stops, column }, from, to) {
    const texts = stops.slice(Math.max(0, from), to + 1).map(([text]) => text);
    const { name: called, range } = scale.dataset;
    const asked = range && texts.length > 1 ? `${texts[0]}..${texts.at(-1)}` : texts.map((t) => (t.includes(" ") ? `"${t}"` : t)).join(",");
    const others = table.asked.tests.filter((test) => test.column !== column).map(({ token }) => token);
    table.ask([...table.asked.words, ...others, ...(texts.length ? [`${called}=${asked}`] : [])].join(" "));
  }

  for (const one of scales) {
    const { scale, stops } = one;
    const up = (event) => { // the place in the picture's own units
      const { top, height } = picture.getBoundingClientRect();
      return (event.clientY - top) * picture.viewBox.baseVal.height / height;
    };
    let start = null;
    scale.addEventListener("pointerdown", (event) => { start = up(event); scale.setPointerCapture(event.pointerId); });
    scale.addEventListener("pointermove", (event) => { if (start !== null) cover(one, start, up(event)); });
    scale.addEventListener("pointerup", (event) => {
      const [high, low] = [start, up(event)].sort((a, b) => a - b);
      start = null;
      const kept = stops.map(([, y], i) => [y, i]).filter(([y]) => y >= high - 3 && y <= low + 3).map(([, i]) => i);
      brush(one, ...(kept.length ? [kept[0], kept.at(-1)] : [0, -1]));
    });
    scale.addEventListener("keydown", (event) => {
      const now = tests(one.column).length ? within(one).map((stop) => stops.indexOf(stop)) : [];
      const by = { ArrowUp: 1, ArrowDown: -1 }[event.key] * Math.ceil(stops.length / 20);
      const clip = (i) => Math.max(0, Math.min(stops.length - 1, i));
      if (event.key === "Escape") brush(one, 0, -1);
      else if (!by) return;
      else if (!now.length) brush(one, ...(by > 0 ? [0, 0] : [stops.length - 1, stops.length - 1]));
      else brush(one, event.shiftKey && by > 0 ? now[0] : clip(now[0] + by), event.shiftKey && by < 0 ? now.at(-1) : clip(now.at(-1) + by));
      event.preventDefault();
    });
  }

  function cover({ brush: box }, a, b) {
    box.setAttribute("y", Math.min(a, b) - 5);
    box.setAttribute("height", Math.abs(b - a) + 10);
  }

  function marked() {
    for (const { path, row } of lines) path.classList.toggle("off", row.hidden);
    for (const one of scales) {
      const inside = within(one), all = !tests(one.column).length || !inside.length;
      cover(one, ...(all ? [-100, -100] : [inside[0][1], inside.at(-1)[1]]));
      one.scale.setAttribute("aria-valuetext", all ? "all" : `${inside[0][0]} to ${inside.at(-1)[0]}`);
      one.scale.setAttribute("aria-valuenow", all ? 0 : one.stops.indexOf(inside[0]));
    }
  }

  const told = document.getElementById("line");
  picture.addEventListener("pointermove", (event) => {
    const { left, top, width, height } = picture.getBoundingClientRect(), box = picture.viewBox.baseVal;
    const [x, y] = [(event.clientX - left) * box.width / width, (event.clientY - top) * box.height / height];
    const far = ({ points, row }) => {
      const i = points.findIndex(([at]) => at > x);
      if (i < 1 || row.hidden) return Infinity;
      const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
      return Math.abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y);
    };
    const near = lines.map((line) => [far(line), line]).sort((a, b) => a[0] - b[0])[0];
    for (const { path } of lines) path.classList.toggle("near", near[0] < 12 && path === near[1].path);
    view.near = near[0] < 12 ? near[1].row : null;
    told.textContent = view.near ? [...view.near.cells].map((cell) => cell.textContent.trim()).slice(0, 8).join(" · ") : "";
  });
  picture.addEventListener("click", () => {
    const box = boxes.find((one) => one.row === view.near);
    if (box) { box.checked = !box.checked; changed(); }
  });

  // The address

  function save() {
    const parts = { filter: table.filter.value.trim(), trials: chosen().map((box) => box.value).join(","), also: also.value,
      steps: view.range ? view.range.map(Math.round).join("-") : "" };
    const kept = Object.entries(parts).filter(([part, text]) => text || part === "trials");
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  function restore() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const ids = asked.has("trials") ? asked.get("trials").split(",") : null;
    for (const box of boxes) box.checked = ids ? ids.includes(box.value) : box.defaultChecked;
    also.value = asked.get("also") || "";
    view.range = asked.has("steps") ? asked.get("steps").split("-").map(Number) : null;
    table.ask(asked.get("filter") || "");
    overlay();
  }

  const changed = () => { save(); overlay(); };
  table.addEventListener("filtered", () => { marked(); });
  table.filter.addEventListener("input", save);
  addEventListener("hashchange", restore);
  restore();
}
