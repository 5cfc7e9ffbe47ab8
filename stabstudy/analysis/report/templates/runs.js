// All runs: chosen ones overlaid, parallel coordinates that filter the table, and the view in the address.
"use strict";
{
  const MOST = 24; // runs in one overlay
  const byId = (id) => document.getElementById(id);
  const [table, also, place, legend, note] = ["all", "also", "curves", "legend", "note"].map(byId);
  const rows = [...table.tBodies[0].rows];
  const labels = JSON.parse(table.dataset.curves); // curve -> [label, whether on a log scale]
  const filter = document.querySelector(".filter input");
  const view = { range: undefined, hidden: new Set(), looks: new Map(), turn: 0 };

  const boxes = [...table.querySelectorAll("input")]; // of a run with a trace
  const chosen = () => boxes.filter((box) => box.checked);
  const choose = (wanted) => { for (const box of boxes) box.checked = wanted(box); changed(); };

  // The overlay, and its legend: a row per run, to hide it, with its values at the cursor

  // A run keeps its colour while it is chosen.
  function looks(some) {
    for (const box of view.looks.keys()) if (!some.includes(box)) view.looks.delete(box);
    for (const box of some) {
      const taken = [...view.looks.values()];
      if (!view.looks.has(box)) view.looks.set(box, [...Array(MOST).keys()].find((i) => !taken.includes(i)));
    }
    return some.map((box) => charts.style(view.looks.get(box)));
  }

  async function overlay() {
    const turn = view.turn += 1, some = chosen().slice(0, MOST), styles = looks(some);
    const missing = (error) => { note.textContent = error.message; return {}; };
    note.textContent = some.length < chosen().length ? `Only the first ${MOST} chosen runs are drawn.` : "";
    const curves = await Promise.all(some.map((box) => charts.trace(box.value).catch(missing)));
    if (turn !== view.turn) return;
    const names = [...Object.keys(labels).slice(0, 3), also.value].filter((name) => curves.some((of) => of[name]));
    const absent = some.length && also.value && !names.includes(also.value);
    if (absent) note.textContent ||= `No chosen run has this curve: ${labels[also.value][0]}.`;
    const line = (of, i, name, panel) => ({ ...of[name], meta: [i, panel], name: some[i].value,
      visible: !view.hidden.has(some[i]), line: { ...styles[i], width: 1.4 } });
    const panels = names.map((name, panel) => ({ label: labels[name][0], log: labels[name][1],
      traces: curves.flatMap((of, i) => (of[name] ? [line(of, i, name, panel)] : [])) }));
    const cursor = entries(some, styles, panels.map(({ label }) => label));
    const zoomed = (range) => { view.range = range || undefined; save(); };
    place.hidden = legend.hidden = !panels.length;
    if (panels.length) await charts.draw(place, panels, { range: view.range, cursor, changed: zoomed }).catch(missing);
  }

  function entries(some, styles, heads) {
    const cell = (tag, text) => make(tag, { className: "n" }, text);
    const lines = some.map((box, i) => {
      const row = box.closest("tr"), hidden = view.hidden.has(box);
      const swatch = make("span", { className: `swatch ${styles[i].dash}` });
      swatch.style.borderTopColor = styles[i].color;
      const hide = make("button", { type: "button" }, swatch, ` ${box.getAttribute("aria-label")}`);
      hide.setAttribute("aria-pressed", !hidden);
      hide.onclick = () => { view.hidden[hidden ? "delete" : "add"](box); overlay(); };
      const link = make("td", {}, row.cells[0].lastElementChild.cloneNode(true));
      return make("tr", {}, make("th", { scope: "row" }, hide), link, ...heads.map(() => cell("td", "")));
    });
    const names = heads.map((title) => make("td", { className: "n", title })); // written while the cursor is on a step
    legend.tHead.rows[0].replaceChildren(cell("td", ""), cell("td", ""), ...names);
    legend.tBodies[0].replaceChildren(...lines);
    return (step, points) => {
      legend.caption.textContent = step === null ? "Drawn" : `Drawn, with the values nearest to step ${step}`;
      for (const name of names) name.textContent = step === null ? "" : name.title;
      for (const one of lines.flatMap((line) => [...line.cells].slice(2))) one.textContent = "";
      for (const { data: { meta: [i, panel] }, y } of points) lines[i].cells[panel + 2].textContent = +y.toPrecision(4);
    };
  }

  // Parallel coordinates: what is chosen on a scale is written into the filter, and the filter is drawn on the scales

  const picture = byId("parallel"), lines = document.querySelectorAll(".line"); // none of a single run
  const scales = [...document.querySelectorAll(".scale")].map((scale) => (
    { scale, stops: JSON.parse(scale.dataset.stops), column: table.names.get(scale.dataset.name) }));

  // The stops that the filter leaves, by number; none where it does not ask for this scale.
  function inside({ stops, column }) {
    const tests = table.asked.filter((term) => term.column === column).map(({ test }) => test);
    const numbers = tests.length ? [...stops.keys()] : [];
    return numbers.filter((i) => tests.every((test) => test(stops[i][0].toLowerCase())));
  }

  // Only the stops [from, to] of a scale; none of them: all.
  function ask(one, from, to) {
    const texts = one.stops.slice(from, to + 1).map(([text]) => (text.includes(" ") ? `"${text}"` : text));
    const { name, range } = one.scale.dataset;
    const operand = range && texts.length > 1 ? `${texts[0]}..${texts.at(-1)}` : texts.join(",");
    const others = table.asked.filter(({ column }) => column !== one.column).map(({ token }) => token);
    table.ask([...others, ...(texts.length ? [`${name}=${operand}`] : [])].join(" "));
    save();
  }

  function cover({ scale }, high, low) {
    const brush = scale.querySelector(".brush");
    brush.setAttribute("y", Math.min(high, low) - 5);
    brush.setAttribute("height", Math.abs(low - high) + 10);
  }

  for (const one of scales) {
    const { scale, stops } = one, last = stops.length - 1;
    const unit = () => picture.viewBox.baseVal.height / picture.clientHeight;
    const height = ({ clientY }) => (clientY - picture.getBoundingClientRect().top) * unit();
    let start = null;
    scale.addEventListener("pointerdown", (event) => {
      start = height(event);
      scale.setPointerCapture(event.pointerId);
    });
    scale.addEventListener("pointermove", (event) => { if (start !== null) cover(one, start, height(event)); });
    scale.addEventListener("pointerup", (event) => {
      const [high, low] = [start, height(event)].sort((a, b) => a - b);
      start = null;
      const under = [...stops.keys()].filter((i) => stops[i][1] >= high - 3 && stops[i][1] <= low + 3);
      ask(one, under[0] ?? 0, under.at(-1) ?? -1);
    });
    scale.addEventListener("keydown", (event) => {
      const by = { ArrowUp: 1, ArrowDown: -1, Escape: 0 }[event.key] * Math.ceil(stops.length / 20);
      if (Number.isNaN(by)) return;
      const now = inside(one), move = (i) => Math.max(0, Math.min(last, i + by));
      const [from, to] = now.length ? [now[0], now.at(-1)] : by > 0 ? [-by, -by] : [last - by, last - by];
      event.preventDefault();
      if (!by) ask(one, 0, -1);
      else ask(one, event.shiftKey && by > 0 ? from : move(from), event.shiftKey && by < 0 ? to : move(to));
    });
  }

  table.addEventListener("filtered", () => {
    for (const line of lines) line.classList.toggle("off", rows[line.dataset.row].hidden);
    for (const one of scales) {
      const now = inside(one), ends = [now[0], now.at(-1)].map((i) => one.stops[i]);
      cover(one, ...(now.length ? ends.map(([, y]) => y) : [-99, -99]));
      one.scale.setAttribute("aria-valuetext", now.length ? ends.map(([text]) => text).join(" to ") : "all");
      one.scale.setAttribute("aria-valuenow", now[0] ?? 0);
    }
  });
  for (const line of lines) line.onclick = () => rows[line.dataset.row].querySelector("input")?.click();

  // The address

  function save() {
    const parts = { filter: filter.value.trim(), trials: chosen().map((box) => box.value).join(), also: also.value,
      steps: (view.range || []).map(Math.round).join("-") };
    const kept = Object.entries(parts).filter(([part, text]) => text || part === "trials");
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  function restore() {
    const parts = new URLSearchParams(location.hash.slice(1)), ids = parts.get("trials")?.split(",");
    for (const box of boxes) box.checked = ids ? ids.includes(box.value) : box.defaultChecked;
    also.value = parts.get("also") || "";
    view.range = parts.get("steps")?.split("-").map(Number);
    table.ask(parts.get("filter") || "");
    overlay();
  }

  const changed = () => { save(); overlay(); };
  byId("choose").onclick = () => choose((box) => !box.closest("tr").hidden);
  byId("clear").onclick = () => choose(() => false);
  for (const element of [table, also]) element.addEventListener("change", changed);
  filter.addEventListener("input", save);
  addEventListener("hashchange", restore);
  restore();
}
