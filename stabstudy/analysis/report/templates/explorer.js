// The step explorer of a trial's page: any range of its steps and each of its spikes, both in the address of the page.
// Until the library is there, and where it is not, the picture of the whole trace stands in its place.
"use strict";
{
  const AROUND = 25; // rows shown on either side of a step that is asked for
  const MARKED = 120; // rows up to which each has a mark

  function explore(figure) {
    const own = JSON.parse(figure.dataset.steps), curves = charts.decode(own);
    const step = curves.grad_norm.x, last = step.length - 1;
    const parts = figure.querySelector("template").content, [bar, out, place, , folded] = parts.children;
    const { first, final, norm, loss, mean, below } = bar.elements;
    const picture = figure.querySelector(".scroll");
    picture.before(parts);
    folded.append(picture);
    let [from, to] = [0, last]; // rows
    let pinned = null; // a step
    const pin = (s) => { pinned = place.step = s; };
    const rowOf = (s) => { const i = step.findIndex((v) => v >= s); return i < 0 ? last : i; };
    const whole = () => to - from === last;

    // The view, in the address as #steps=120-180&step=131

    function go(a, b) {
      const size = Math.max(Math.min(2, last), Math.min(last, Math.round(b - a)));
      from = Math.max(0, Math.min(last - size, Math.round(a)));
      to = from + size;
      draw();
    }
    function goAround(s) {
      pin(s);
      go(rowOf(s) - AROUND, rowOf(s) + AROUND);
    }
    function hop(by) {
      const rest = own.peaks.filter((s) => pinned === null || (s - pinned) * by > 0);
      goAround((rest.length ? rest : own.peaks).at(by > 0 ? 0 : -1)); // behind the last the first
    }
    function restore() {
      const asked = new URLSearchParams(location.hash.slice(1));
      const range = asked.get("steps")?.split("-").map(Number);
      const kept = asked.has("step") ? Number(asked.get("step")) : null;
      if (range || kept !== null) figure.parentElement.scrollIntoView();
      if (!range && kept !== null) return goAround(kept);
      pin(kept);
      return range ? go(...range.map(rowOf)) : draw();
    }
    function remember() {
      const view = new URLSearchParams(whole() ? {} : { steps: `${step[from]}-${step[to]}` });
      if (pinned !== null) view.set("step", pinned);
      const address = view.size ? `#${view}` : "#trace";
      if (view.size || location.hash.startsWith("#step")) history.replaceState(null, "", address);
    }

    // What is in view of a curve, and so many points on either side.
    function part({ x, y }, beside) {
      const a = x.findIndex((s) => s >= step[from]), b = x.findLastIndex((s) => s <= step[to]);
      const ends = [Math.max(0, (a < 0 ? x.length : a) - beside), b + 1 + beside];
      return { x: x.slice(...ends), y: y.slice(...ends) };
    }

    const isShown = ({ name, yaxis }) => (name !== "EMA" || mean.checked) && (yaxis !== "y3" || name === below.value);

    function draw() {
      remember();
      [first.value, final.value] = [step[from], step[to]];
      place.cursor(null);
      const mode = to - from < MARKED ? "lines+markers" : "lines";
      const data = own.data.filter(isShown).map((one) => (
        { mode, ...one, ...part(curves[one.curve], one.mode === "markers" ? 0 : 1) }));
      const reached = ({ yref, y0 }) => data.some(({ yaxis, y }) => (
        yaxis === yref && y.some((v) => v <= y0) && y.some((v) => v >= y0)));
      const isInView = (shape) => (
        shape.xref ? whole() || reached(shape) : shape.x1 >= step[from] && shape.x0 <= step[to]);
      const pins = pinned === null ? [] : [{ ...own.pin, x0: pinned, x1: pinned }];
      const { layout } = own;
      Object.assign(layout.xaxis, { range: [step[from] - 0.5, step[to] + 0.5], dtick: to - from < 10 ? 1 : null });
      layout.yaxis.type = norm.value;
      layout.yaxis2.type = loss.value;
      layout.yaxis3.title.text = below.value;
      const shapes = [...layout.shapes.filter(isInView), ...pins];
      return charts.draw(place, below.value ? 3 : 2, data, { ...layout, shapes });
    }

    function reading(s) {
      const isRead = (one) => one.name && (isShown(one) || one.curve === "clip_scale");
      const values = own.data.filter(isRead).map(({ name, curve }) => (
        `${name} ${charts.read(curves[curve], s)}`));
      const inSpike = own.layout.shapes.some(({ type, x0, x1 }) => type === "rect" && s >= x0 && s <= x1);
      return [`step ${s}`, ...values, ...(inSpike ? ["in a spike"] : [])].join(", ");
    }

    function csv(link) {
      const columns = Object.entries(curves).filter(([, { x }]) => x === step), lines = [];
      for (let i = from; i <= to; i += 1) lines.push([step[i], ...columns.map(([, { y }]) => y[i])]);
      const text = [["step", ...columns.map(([name]) => name)], ...lines].map((line) => `${line}\r\n`);
      link.href = URL.createObjectURL(new Blob(text, { type: "text/csv" }));
      link.download = `${own.trial}${whole() ? "" : `-steps-${step[from]}-${step[to]}`}.csv`;
    }

    place.cursor = (s) => {
      place.step = s ?? pinned;
      out.value = place.step === null ? `${to - from + 1} of ${last + 1} recorded steps` : reading(place.step);
    };
    place.zoomed = (range) => { // by the pointer or the keyboard
      const [a, b] = range ? [rowOf(Math.ceil(range[0])), rowOf(Math.floor(range[1]))] : [0, last];
      if (a !== from || b !== to) go(a, b);
    };
    const actions = {
      out: () => charts.zoom(place, 2), in: () => charts.zoom(place, 0.5), next: () => hop(1), previous: () => hop(-1),
      all: () => { pin(null); go(0, last); }, csv,
    };
    bar.onclick = ({ target }) => actions[target.dataset.does]?.(target);
    place.clicked = (s) => { pin(s); draw(); };
    bar.onchange = ({ target }) => (target.type === "number" ? go(rowOf(first.value), rowOf(final.value)) : draw());
    addEventListener("hashchange", restore);
    restore();
  }

  for (const figure of document.querySelectorAll("figure[data-steps]")) {
    const missing = ({ message }) => figure.prepend(make("p", { className: "hint" }, message));
    charts.load("plotly.js").then(() => explore(figure), missing);
  }
}
