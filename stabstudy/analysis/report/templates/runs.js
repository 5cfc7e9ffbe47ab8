// All runs: chosen ones overlaid, parallel coordinates that filter the table, and the view in the address.
"use strict";
{
  const byId = (id) => document.getElementById(id);
  const [table, also, place, legend, note] = ["all", "also", "curves", "legend", "note"].map(byId);
  const rows = [...table.tBodies[0].rows], boxes = [...table.querySelectorAll("input")]; // of the runs with a trace
  const filter = document.querySelector(".filter input");
  const own = JSON.parse(table.dataset.chart);
  const looks = own.lines.map(() => null); // the run that has each look: it keeps it while it is chosen
  const hidden = new Set();
  let steps = null, turn = 0; // of a zoom [first, last]

  const chosen = () => boxes.filter((box) => box.checked);
  const choose = (wanted) => { for (const box of boxes) box.checked = wanted(box); changed(); };

  async function overlay() {
    const now = turn += 1, some = chosen().slice(0, looks.length);
    looks.forEach((box, i) => { if (!some.includes(box)) looks[i] = null; });
    for (const box of some) if (!looks.includes(box)) looks[looks.indexOf(null)] = box;
    note.value = some.length < chosen().length ? `Only the first ${some.length} chosen runs are drawn.` : "";
    const missing = (error) => { note.value = error.message; return {}; };
    const curves = await Promise.all(some.map((box) => charts.trace(box.value).catch(missing)));
    if (now !== turn) return; // another choice was made meanwhile
    const names = [...own.first, also.value].filter((name) => curves.some((of) => of[name]));
    const isAbsent = some.length && also.value && !names.includes(also.value);
    if (isAbsent) note.value ||= `No chosen run has this curve: ${own.axes[also.value].title.text}.`;
    const runs = some.map((box, i) => ({ box, curves: curves[i], line: own.lines[looks.indexOf(box)] }));
    const data = names.flatMap((name, i) => runs.filter((run) => run.curves[name]).map((run) => ({ ...own.curve,
      ...run.curves[name], name: run.box.value, yaxis: `y${i + 1}`, line: run.line, visible: !hidden.has(run.box) })));
    const axes = Object.fromEntries(names.map((name, i) => [`yaxis${i + 1}`, own.axes[name]]));
    const xaxis = { ...own.layout.xaxis, ...(steps ? { range: steps } : { autorange: true }) };
    place.cursor = entries(runs, names);
    place.hidden = legend.hidden = !names.length;
    if (names.length) await charts.draw(place, names.length, data, { ...own.layout, ...axes, xaxis }).catch(missing);
  }

  // The legend: a row per run, to hide it, with its values at the cursor, else its last ones. Answers how to move it.
  function entries(runs, names) {
    const cell = (text) => make("td", { className: "n" }, text);
    const lines = runs.map(({ box, line }) => {
      const swatch = make("span", { className: `swatch ${line.dash}` });
      swatch.style.borderTopColor = line.color;
      const hide = make("button", { type: "button", ariaPressed: !hidden.has(box) }, swatch, ` ${box.ariaLabel}`);
      hide.onclick = () => { if (!hidden.delete(box)) hidden.add(box); overlay(); };
      const link = make("td", {}, box.nextElementSibling.cloneNode(true));
      return make("tr", {}, make("th", { scope: "row" }, hide), link, ...names.map(() => cell("")));
    });
    legend.tHead.rows[0].replaceChildren(...["", "", ...names.map((name) => own.axes[name].title.text)].map(cell));
    legend.tBodies[0].replaceChildren(...lines);
    const read = (step) => {
      legend.caption.textContent = `Drawn, with ${step === null ? "the last values" : `the values at step ${step}`}`;
      runs.forEach(({ curves }, i) => names.forEach((name, panel) => {
        lines[i].cells[panel + 2].textContent = curves[name] ? charts.read(curves[name], step ?? Infinity) : "";
      }));
    };
    read(null);
    return read;
  }

  // Parallel coordinates: what is chosen on a scale is written into the filter, and the filter is drawn on the scales

  const picture = byId("parallel"), lines = document.querySelectorAll(".line"); // none of a single run
  const scales = [...document.querySelectorAll(".scale")].map((scale) => (
    { scale, stops: JSON.parse(scale.dataset.stops), column: table.names.get(scale.dataset.name) }));

  // The stops that the filter leaves, by number; none where it does not ask for this scale.
  function left({ stops, column }) {
    const tests = table.asked.filter((term) => term.column === column).map(({ test }) => test);
    const numbers = tests.length ? [...stops.keys()] : [];
    return numbers.filter((i) => tests.every((test) => test(stops[i][0].toLowerCase())));
  }

  // Only the stops [from, to] of a scale; none of them: all.
  function ask({ scale, stops, column }, from = 0, to = -1) {
    const texts = stops.slice(from, to + 1).map(([text]) => (text.includes(" ") ? `"${text}"` : text));
    const isRange = scale.dataset.range && texts.length > 1;
    const term = `${scale.dataset.name}=${isRange ? `${texts[0]}..${texts.at(-1)}` : texts.join(",")}`;
    const others = table.asked.filter((one) => one.column !== column).map(({ token }) => token);
    table.ask([...others, ...(texts.length ? [term] : [])].join(" "));
    save();
  }

  function cover({ scale }, high, low) {
    const brush = scale.querySelector(".brush");
    brush.setAttribute("y", Math.min(high, low) - 5);
    brush.setAttribute("height", Math.abs(low - high) + 10);
  }

  for (const one of scales) {
    const { scale, stops } = one, last = stops.length - 1;
    const height = ({ clientX, clientY }) => (
      new DOMPoint(clientX, clientY).matrixTransform(picture.getScreenCTM().inverse()).y);
    let start = 0;
    scale.onpointerdown = (event) => {
      start = height(event);
      scale.setPointerCapture(event.pointerId);
    };
    scale.onpointermove = (event) => {
      if (scale.hasPointerCapture(event.pointerId)) cover(one, start, height(event));
    };
    scale.onpointerup = (event) => {
      const [high, low] = [start, height(event)].sort((a, b) => a - b);
      const under = [...stops.keys()].filter((i) => stops[i][1] >= high - 3 && stops[i][1] <= low + 3);
      ask(one, under[0], under.at(-1));
    };
    scale.onkeydown = (event) => {
      const by = { ArrowUp: 1, ArrowDown: -1, Escape: 0 }[event.key] * Math.ceil(stops.length / 20);
      if (Number.isNaN(by)) return;
      event.preventDefault();
      const now = left(one), outside = by > 0 ? -by : last - by;
      const [from, to] = [now[0] ?? outside, now.at(-1) ?? outside];
      const move = (i) => Math.max(0, Math.min(last, i + by));
      if (!by) ask(one);
      else ask(one, event.shiftKey && by > 0 ? from : move(from), event.shiftKey && by < 0 ? to : move(to));
    };
  }

  table.addEventListener("filtered", () => {
    for (const line of lines) line.classList.toggle("off", rows[line.dataset.row].hidden);
    for (const one of scales) {
      const now = left(one), ends = now.length ? [one.stops[now[0]], one.stops[now.at(-1)]] : [];
      cover(one, ends[0]?.[1] ?? -99, ends[1]?.[1] ?? -99);
      one.scale.ariaValueText = ends.map(([text]) => text).join(" to ") || "all";
      one.scale.ariaValueNow = now[0] ?? 0;
    }
  });
  for (const line of lines) line.onclick = () => rows[line.dataset.row].querySelector("input")?.click();

  // The address

  function save() {
    const parts = { filter: filter.value.trim(), trials: chosen().map((box) => box.value).join(), also: also.value,
      steps: (steps || []).map(Math.round).join("-") };
    const kept = Object.entries(parts).filter(([part, text]) => text || part === "trials");
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  function restore() {
    const parts = new URLSearchParams(location.hash.slice(1)), ids = parts.get("trials")?.split(",");
    for (const box of boxes) box.checked = ids ? ids.includes(box.value) : box.defaultChecked;
    also.value = parts.get("also") || "";
    steps = parts.get("steps")?.split("-").map(Number);
    table.ask(parts.get("filter") || "");
    overlay();
  }

  const changed = () => { save(); overlay(); };
  place.zoomed = (range) => { steps = range; save(); };
  byId("choose").onclick = () => choose((box) => !box.closest("tr").hidden);
  byId("clear").onclick = () => choose(() => false);
  for (const element of [table, also]) element.onchange = changed;
  filter.addEventListener("input", save);
  onhashchange = restore;
  restore();
}
